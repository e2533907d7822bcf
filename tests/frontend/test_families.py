"""The nine families on checkpoints that transformers wrote: specs, layers, and every weight.

The expected specs are written from transformers' modelling code and its config objects; the
expected weights are the parameters of its modules, and must be equal bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors import safe_open

from moec.checkpoint import Checkpoint
from moec.frontend import Model, builtin, read_model
from moec.spec import (
    ActivationSpec,
    ApplyTo,
    BlockNorms,
    Clamp,
    ExpertsSpec,
    GroupScore,
    GroupSpec,
    Masked,
    MoESpec,
    Nonlinearity,
    NormSpec,
    Precision,
    Renorm,
    RouterSpec,
    Score,
    Selection,
    SharedExpertSpec,
    SharedGate,
    WeightSource,
)
from tests.conftest import Saved
from tests.frontend import canonical
from tests.models import DTYPES, FAMILIES, VARIANTS, moe_layers

SILU = ActivationSpec(Nonlinearity.SILU)
ACTIVATIONS = {
    "silu": SILU,
    "gelu": ActivationSpec(Nonlinearity.GELU_ERF),
    "gelu_pytorch_tanh": ActivationSpec(Nonlinearity.GELU_TANH),
}


def mixtral(c: Any, dtype: str) -> MoESpec:
    # the weights stay float32 after softmax(logits.float())
    router = RouterSpec(c.num_local_experts, c.num_experts_per_tok, renorm=Renorm.SUM)
    return MoESpec(dtype, router, experts(c, c.num_local_experts, c.intermediate_size))


def experts(c: Any, count: int, width: int, **more: Any) -> ExpertsSpec:
    act = ACTIVATIONS[c.hidden_act]
    return ExpertsSpec(count, c.num_experts_per_tok, c.hidden_size, width, activation=act, **more)


def softmax_rounded(c: Any) -> RouterSpec:
    """softmax in float32, top-k, sum if norm_topk_prob, then back to the dtype of the logits."""
    renorm = Renorm.SUM if c.norm_topk_prob else Renorm.NONE
    return RouterSpec(
        c.num_experts, c.num_experts_per_tok, renorm=renorm, weights_dtype=Precision.MODEL
    )


def qwen2_moe(c: Any, dtype: str) -> MoESpec:
    shared = SharedExpertSpec(c.shared_expert_intermediate_size, SILU, SharedGate.SIGMOID)
    inner = experts(c, c.num_experts, c.moe_intermediate_size)
    return MoESpec(dtype, softmax_rounded(c), inner, shared)


def qwen3_moe(c: Any, dtype: str) -> MoESpec:
    inner = experts(c, c.num_experts, c.moe_intermediate_size)
    return MoESpec(dtype, softmax_rounded(c), inner)


def olmoe(c: Any, dtype: str) -> MoESpec:
    return MoESpec(dtype, softmax_rounded(c), experts(c, c.num_experts, c.intermediate_size))


def deepseek_v3(c: Any, dtype: str) -> MoESpec:
    renorm = {"renorm": Renorm.SUM, "renorm_epsilon": 1e-20} if c.norm_topk_prob else {}
    router = RouterSpec(
        c.n_routed_experts,
        c.num_experts_per_tok,
        Score.SIGMOID,
        Precision.FLOAT32,
        selection_bias=True,
        groups=GroupSpec(c.n_group, c.topk_group, GroupScore.SUM_TOP2, Masked.MINUS_INF),
        scale=c.routed_scaling_factor,
        **renorm,
    )
    shared = SharedExpertSpec(c.moe_intermediate_size * c.n_shared_experts, SILU)
    inner = experts(c, c.n_routed_experts, c.moe_intermediate_size)
    return MoESpec(dtype, router, inner, shared)


def gpt_oss(c: Any, dtype: str) -> MoESpec:
    router = RouterSpec(
        c.num_local_experts,
        c.num_experts_per_tok,
        Score.NONE,
        logit_bias=True,
        weight_source=WeightSource.SOFTMAX_SELECTED,
        weights_dtype=Precision.MODEL,
    )
    act = ActivationSpec(
        Nonlinearity.SILU, c.swiglu_alpha, Clamp.BEFORE, c.swiglu_limit, up_offset=1.0
    )
    inner = ExpertsSpec(
        c.num_local_experts, c.num_experts_per_tok, c.hidden_size, c.intermediate_size,
        activation=act, gate_up_bias=True, down_bias=True,
    )  # fmt: skip
    return MoESpec(dtype, router, inner)


def llama4_text(c: Any, dtype: str) -> MoESpec:
    router = RouterSpec(
        c.num_local_experts,
        c.num_experts_per_tok,
        Score.NONE,
        weight_source=WeightSource.SIGMOID_SELECTED,
        weights_dtype=Precision.MODEL,
        apply_to=ApplyTo.INPUT,
    )
    inner = experts(c, c.num_local_experts, c.intermediate_size)
    return MoESpec(dtype, router, inner, SharedExpertSpec(c.intermediate_size, SILU))


def gemma4_text(c: Any, dtype: str) -> MoESpec:
    router = RouterSpec(c.num_experts, c.top_k_experts, renorm=Renorm.SUM, per_expert_scale=True)
    act = ACTIVATIONS[c.hidden_activation]
    inner = ExpertsSpec(
        c.num_experts, c.top_k_experts, c.hidden_size, c.moe_intermediate_size, activation=act
    )
    norm = NormSpec(c.rms_norm_eps)
    norms = BlockNorms(
        NormSpec(c.rms_norm_eps, scale=c.hidden_size**-0.5), norm, norm, norm, norm, norm, True
    )
    return MoESpec(dtype, router, inner, SharedExpertSpec(c.intermediate_size, act), norms)


def phimoe(c: Any, dtype: str) -> MoESpec:
    router = RouterSpec(
        c.num_local_experts,
        c.num_experts_per_tok,
        Score.NONE,
        selection=Selection.SPARSEMIXER,
        sparsemixer_eps=c.router_jitter_noise,
        weight_source=WeightSource.SPARSEMIXER,
        weights_dtype=Precision.MODEL,
    )
    return MoESpec(dtype, router, experts(c, c.num_local_experts, c.intermediate_size))


SPECS: dict[str, Callable[[Any, str], MoESpec]] = {
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
    "llama4_text": llama4_text,
    "gemma4_text": gemma4_text,
    "phimoe": phimoe,
}

ALL = [
    pytest.param(family, variant, dtype, id=f"{family}-{variant}-{dtype}")
    for family in FAMILIES
    for variant in VARIANTS
    for dtype in DTYPES
]


def assert_same_bits(got: Any, want: Any) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype) and got.flags.c_contiguous
    bits = f"u{want.dtype.itemsize}"
    np.testing.assert_array_equal(got.view(bits), np.ascontiguousarray(want).view(bits))


def assert_weights(model: Model, path: Path, expected: Callable[[int], dict[str, Any]]) -> None:
    """Every canonical tensor of every block is what `expected` of its layer says."""
    with Checkpoint.open(path) as checkpoint:
        for block in model.blocks:
            want = expected(block.layer)
            assert (
                set(want) == {name for name, _ in block.plan.params} == set(block.spec.parameters())
            )
            for name, array in want.items():
                assert_same_bits(block.plan.tensor(checkpoint, name), array)
                if block.plan[name].per_expert:
                    last = len(array) - 1
                    assert_same_bits(block.plan.expert(checkpoint, name, last), array[last])


@pytest.mark.parametrize(("family", "variant", "dtype"), ALL)
def test_specs_layers_and_weights(saved: Saved, family: str, variant: str, dtype: str) -> None:
    module, path = saved(family, variant, dtype)
    model = read_model(path)
    layers = moe_layers(module)
    assert (model.family, model.model_type, model.dtype) == (family, family, dtype)
    assert [block.layer for block in model.blocks] == layers and layers
    assert sorted([*model.dense_layers, *layers]) == [*range(module.config.num_hidden_layers)]
    for block in model.blocks:
        assert block.spec == SPECS[family](module.config, dtype)
    assert_weights(model, path, lambda n: canonical.parameters(module, family, n))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_tensor_is_read(saved: Saved, family: str, variant: str) -> None:
    """The names that the safetensors library finds under the MoE layers, all of them."""
    _, path = saved(family, variant, "float32")
    model = read_model(path)
    with safe_open(path / "model.safetensors", "np") as file:
        stored = set(file.keys())
    used = {
        piece.name(e)
        for block in model.blocks
        for _, plan in block.plan.params
        for piece in plan.pieces
        for e in range(plan.experts)
    }
    blocks = tuple(f"{model.prefix}layers.{b.layer}." for b in model.blocks)
    outside = ("self_attn", "input_layernorm", "post_attention_layernorm", "layer_scalar")
    ours = {n for n in stored if n.startswith(blocks) and not any(o in n for o in outside)}
    assert used == ours


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    """A field that the config leaves out means what transformers' config class makes of it."""
    config = getattr(transformers, FAMILIES[family][0])()
    own = next(f for f in builtin() if f.family == family)
    # transformers has no such fields: its code does what the default says.
    absent = {"scoring_func", "topk_method", "moe_layer_freq"}
    for field in own.config.values():
        found = [getattr(config, key) for key in field.keys if hasattr(config, key)]
        assert found or absent & set(field.keys), field
        if field.default is not None:
            assert all(type(v) is type(field.default) and v == field.default for v in found), field


@pytest.mark.parametrize(
    ("family", "outer"), [("llama4_text", "llama4"), ("gemma4_text", "gemma4")]
)
def test_the_text_model_inside_a_multimodal_one(
    saved: Saved, tmp_path: Path, family: str, outer: str
) -> None:
    """Published multimodal checkpoints nest the config and lengthen the names."""
    from safetensors.numpy import load_file, save_file

    module, path = saved(family, "a", "float32")
    prefix = next(f for f in builtin() if f.family == family).prefixes[0]
    tensors = load_file(path / "model.safetensors")
    renamed = {prefix + n.removeprefix("model."): t for n, t in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    inner = json.loads((path / "config.json").read_text())
    for given in (inner, {k: v for k, v in inner.items() if k != "model_type"}):
        nested = {"model_type": outer, "text_config": given, "vision_config": {"num_experts": 9}}
        (tmp_path / "config.json").write_text(json.dumps(nested))
        model = read_model(tmp_path)
        assert (model.family, model.model_type, model.prefix) == (family, outer, prefix)
        assert_weights(model, tmp_path, lambda n: canonical.parameters(module, family, n))
