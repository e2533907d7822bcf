"""What a block computes in one line of mathematics each, for people: router and activation.

The order of the steps is the order in which `RouterSpec` defines them; steps that do nothing
are left out. Plain ASCII, so that it survives every terminal.
"""

from __future__ import annotations

from ..spec import (
    ActivationSpec,
    ApplyTo,
    Clamp,
    GroupScore,
    GroupSpec,
    Masked,
    Nonlinearity,
    Renorm,
    RouterSpec,
    ScaleOn,
    Score,
    Selection,
    WeightSource,
)

_SCORES = {
    Score.SOFTMAX: "softmax",
    Score.SIGMOID: "sigmoid",
    Score.SQRT_SOFTPLUS: "sqrt(softplus)",
}
_GROUP_SCORES = {GroupScore.MAX: "max", GroupScore.SUM_TOP2: "sum of top 2"}


def router(spec: RouterSpec) -> str:
    """For example "softmax over 128 -> top 8 -> / sum"."""
    steps = [_scores(spec)]
    if spec.groups is not None:
        steps.append(_groups(spec.groups, spec.selection_bias))
    if spec.selection is Selection.SPARSEMIXER:
        steps.append(f"sparsemixer top {spec.top_k} (eps {spec.sparsemixer_eps:g})")
    else:
        steps.append(f"top {spec.top_k}")
    steps += [*_weights(spec), *_renorm(spec)]
    if spec.scale != 1.0 and spec.scale_on is ScaleOn.WEIGHTS:
        steps.append(f"* {spec.scale:g}")
    if spec.per_expert_scale:
        steps.append("* scale of the expert")
    if spec.apply_to is ApplyTo.INPUT:
        steps.append("weight the expert's input")
    if spec.scale != 1.0 and spec.scale_on is ScaleOn.ROUTED_SUM:
        steps.append(f"sum of the experts * {spec.scale:g}")
    return " -> ".join(steps)


def _scores(spec: RouterSpec) -> str:
    inner = "logits + bias" if spec.logit_bias else "logits"
    if spec.logit_scale != 1.0:
        inner = f"{spec.logit_scale:g} * ({inner})"
    if spec.logit_cap is not None:
        inner = f"{spec.logit_cap:g} * tanh(({inner}) / {spec.logit_cap:g})"
    if spec.score is Score.NONE:
        text = inner
    else:
        name = _SCORES[spec.score]
        text = name if inner == "logits" else f"{name} of {inner}"
    text += f" over {spec.num_experts}"
    return f"{text} -> + selection bias" if spec.selection_bias else text


def _groups(groups: GroupSpec, biased_selection: bool) -> str:
    by = _GROUP_SCORES[groups.score]
    if biased_selection and not groups.biased:
        by += " without bias"
    rest = ", the others 0" if groups.masked is Masked.ZERO else ""
    return f"top {groups.kept} of {groups.count} groups (by {by}{rest})"


def _weights(spec: RouterSpec) -> list[str]:
    if spec.weight_source is WeightSource.SOFTMAX_SELECTED:
        return [f"softmax of the {spec.top_k}"]
    if spec.weight_source is WeightSource.SIGMOID_SELECTED:
        return ["sigmoid of each" if spec.top_k > 1 else "sigmoid"]
    if spec.weight_source is WeightSource.SCORE and spec.selection_bias:
        return ["score without bias"]
    return []


def _renorm(spec: RouterSpec) -> list[str]:
    epsilon = f"{spec.renorm_epsilon:g}"
    if spec.renorm is Renorm.SUM:
        return [f"/ (sum + {epsilon})" if spec.renorm_epsilon else "/ sum"]
    if spec.renorm is Renorm.CLAMPED_SUM:
        return [f"/ max(sum, {epsilon})"]
    if spec.renorm is Renorm.P_NORM:
        return [f"/ {spec.renorm_p:g}-norm"]
    return []


def activation(spec: ActivationSpec, gated: bool = True) -> str:
    """For example "silu(gate) * up", or with alpha, limit and offset written out."""
    source = "gate" if gated else "up"
    limit = f"{spec.limit:g}"
    inner = f"min({source}, {limit})" if spec.clamp is Clamp.BEFORE else source
    if spec.kind is Nonlinearity.SILU and spec.alpha != 1.0:
        # swish with a slope; written as silu when there is none, its usual name
        text = f"swish({inner}, slope {spec.alpha:g})"
    else:
        text = f"{spec.kind.value}({inner})"
    if spec.clamp is Clamp.AFTER:
        text = f"min({text}, {limit})"
    if not gated:
        return text
    up = f"clip(up, {limit})" if spec.clamp is not Clamp.NONE else "up"
    return f"{text} * ({up} + {spec.up_offset:g})" if spec.up_offset else f"{text} * {up}"
