"""MSL text: the library of kernels beside this file, and the C++ types made for one block.

A kernel's text is the parts of the library that it needs, the types that say what an
activation or a router computes, and a function that TVM's generated kernel calls.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ...spec import (
    ActivationSpec,
    Clamp,
    GroupScore,
    Masked,
    Nonlinearity,
    Precision,
    Renorm,
    RouterSpec,
    ScaleOn,
    Score,
    WeightSource,
)

_FOLDER = Path(__file__).resolve().parent / "msl"
FORMATS = {"float32": "moec::f32", "float16": "moec::f16", "bfloat16": "moec::bf16"}
# What a storage dtype is called in MSL.
TYPES = {"float32": "float", "float16": "half", "uint16": "ushort", "int32": "int"}


@cache
def part(name: str) -> str:
    """One file of the library."""
    return (_FOLDER / f"{name}.metal").read_text(encoding="utf-8")


def number(value: float) -> str:
    """A float literal that reads back as the same float32."""
    text = f"{value:.9g}"
    return f"{text}f" if any(c in text for c in ".e") else f"{text}.0f"


def flag(value: bool) -> str:
    """A boolean template argument."""
    return "true" if value else "false"


def activation(spec: ActivationSpec, gated: bool) -> str:
    """struct Act: `apply(g, u)` is act(g) * (u + offset), or act(g) without a gate."""
    function = {
        Nonlinearity.SILU: f"moec::silu(g, {number(spec.alpha)})",
        Nonlinearity.GELU_ERF: "moec::gelu_erf(g)",
        Nonlinearity.GELU_TANH: "moec::gelu_tanh(g)",
        Nonlinearity.RELU: "max(g, 0.0f)",
        Nonlinearity.RELU2: "max(g, 0.0f) * max(g, 0.0f)",
    }[spec.kind]
    limit = number(spec.limit)
    lines = []
    if spec.clamp is Clamp.BEFORE:
        lines.append(f"g = min(g, {limit});")
    lines.append(f"float v = {function};")
    if spec.clamp is Clamp.AFTER:
        lines.append(f"v = min(v, {limit});")
    if not gated:
        lines.append("return v;")
    else:
        if spec.clamp is not Clamp.NONE:
            lines.append(f"u = clamp(u, -{limit}, {limit});")
        lines.append(f"return v * (u + {number(spec.up_offset)});" if spec.up_offset
                     else "return v * u;")  # fmt: skip
    body = "\n    ".join(lines)
    return f"struct Act {{\n  static float apply(float g, float u) {{\n    {body}\n  }}\n}};\n"


_SCORES = {Score.SOFTMAX: "SOFTMAX", Score.SIGMOID: "SIGMOID",
           Score.SQRT_SOFTPLUS: "SQRT_SOFTPLUS", Score.NONE: "NO_SCORE"}  # fmt: skip
_SOURCES = {WeightSource.SCORE: "FROM_SCORE", WeightSource.SOFTMAX_SELECTED: "FROM_SOFTMAX",
            WeightSource.SIGMOID_SELECTED: "FROM_SIGMOID",
            WeightSource.SPARSEMIXER: "FROM_SPARSEMIXER"}  # fmt: skip
_RENORMS = {Renorm.NONE: "NO_RENORM", Renorm.SUM: "SUM", Renorm.CLAMPED_SUM: "CLAMPED_SUM",
            Renorm.P_NORM: "P_NORM"}  # fmt: skip


def router(spec: RouterSpec, dtype: str, threshold: float) -> str:
    """struct Router: the constants and roundings of a RouterSpec for a model of `dtype`.

    `threshold` is that of sparsemixer, rounded as the logits are.
    """
    own = FORMATS[dtype if spec.logits_dtype is Precision.MODEL else "float32"]
    final = FORMATS[dtype if spec.weights_dtype is Precision.MODEL else "float32"]
    groups = spec.groups
    switches = {
        "SELECTION_BIAS": spec.selection_bias,
        "PER_EXPERT_SCALE": spec.per_expert_scale,
        "GROUPS_TOP2": groups is not None and groups.score is GroupScore.SUM_TOP2,
        "GROUPS_BIASED": groups is not None and groups.biased,
        "MASKED_ZERO": groups is not None and groups.masked is Masked.ZERO,
    }
    names = [
        *_SCORES.values(), *_SOURCES.values(), *_RENORMS.values(),
        f"SCORE = {_SCORES[spec.score]}", f"SOURCE = {_SOURCES[spec.weight_source]}",
        f"RENORM = {_RENORMS[spec.renorm]}",
        *(f"{name} = {int(on)}" for name, on in switches.items()),
    ]  # fmt: skip
    logit = [f"v = {own}::round(v);"]
    if spec.logit_scale != 1.0:
        logit.append(f"v = {own}::round(v * {number(spec.logit_scale)});")
    if spec.logit_cap is not None:
        logit.append(f"v = {own}::round(moec::soft_cap(v, {number(spec.logit_cap)}));")
    scale = spec.scale if spec.scale_on is ScaleOn.WEIGHTS else 1.0
    functions = {
        "float logit(float v)": " ".join([*logit, "return v;"]),
        "float round_logits(float v)": f"return {own}::round(v);",
        "float round_weights(float v)": f"return {final}::round(v);",
        "float threshold()": f"return {number(threshold)};",
        "float epsilon()": f"return {number(spec.renorm_epsilon)};",
        "float norm_p()": f"return {number(spec.renorm_p)};",
        "float scale()": f"return {number(scale)};",
    }
    body = "".join(f"  static {name} {{ {text} }}\n" for name, text in functions.items())
    return f"struct Router {{\n  enum {{ {', '.join(names)} }};\n{body}}};\n"
