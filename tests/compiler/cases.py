"""The blocks that the tests of the CPU kernels compile, and what their roundings may cost.

Errors are |got - want| / |want| in the norm, with the reference in float64. float32: 1e-5, as
up to some thousand products are summed in an order of our own. 16-bit types: half a unit in
the last place for the output, and the same for h, which is kept in the model's dtype where the
machine multiplies it; hence two roundings, 2 * 2^-9 for bfloat16 (8 bits) and 2 * 2^-12 for
float16 (11 bits), and a third where the routing weight multiplies the input, whose product is
rounded as the model rounds it. A norm before the experts rounds its result twice.
"""

from __future__ import annotations

from typing import Any

from moec.spec import (
    ActivationSpec,
    ApplyTo,
    BlockNorms,
    Clamp,
    ExpertsSpec,
    MoESpec,
    Nonlinearity,
    NormSpec,
    Precision,
    Renorm,
    RouterSpec,
    ScaleOn,
    Score,
    SharedExpertSpec,
    SharedGate,
    WeightSource,
)
from tests.blocks import Small

TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def tolerance(spec: MoESpec) -> float:
    """The error that the roundings of a block may make."""
    weighted = 0.5 if spec.router.apply_to is ApplyTo.INPUT else 0.0
    normed = 1.0 if spec.norms.experts_input else 0.0
    return TOLERANCE[spec.dtype] * (1.0 + weighted + normed)


SILU = ActivationSpec()


def block(
    dtype: str, e: int, k: int, h: int, i: int, act: ActivationSpec = SILU, **more: Any
) -> MoESpec:
    """A block; `more` are `router`, fields of the block itself, or fields of its experts."""
    rows = e + more.get("zero_experts", 0)
    router = RouterSpec(rows, k, logits_dtype=Precision.FLOAT32, **more.pop("router", {}))
    names = ("shared", "norms", "weight_dtypes", "output_bias")
    outer = {n: more.pop(n) for n in names if n in more}
    return MoESpec(dtype, router, ExpertsSpec(e, k, h, i, activation=act, **more), **outer)


def act(kind: str, clamp: str = "none", **more: float) -> ActivationSpec:
    limit = {} if clamp == "none" else {"limit": 0.8}
    return ActivationSpec(Nonlinearity(kind), clamp=Clamp(clamp), **limit, **more)


NORMS = BlockNorms(
    router_input=NormSpec(1e-5, True, 0.25),
    experts_input=NormSpec(),
    experts_output=NormSpec(1e-3),
    shared_input=NormSpec(weighted=False),
    shared_output=NormSpec(),
    block_output=NormSpec(scale=2.0),
    residual=True,
)
SHARED = SharedExpertSpec(21, act("gelu_tanh"), SharedGate.SIGMOID)
MIXED = SharedExpertSpec(12, act("relu2"), SharedGate.SOFTMAX, gated=False, scale=0.5)
BIASES = {"gate_up_bias": True, "down_bias": True}

FUSED, GATHER, LOOP = (("fused",), ("gather",), ("loop",))
# Not every block with every schedule: codegen takes a second for each pair.
CASES: dict[str, Small] = {
    "one of everything": Small(block("float32", 1, 1, 1, 1)),
    "all experts": Small(block("float32", 3, 3, 17, 3, act("gelu_erf"), **BIASES)),
    "no gate": Small(block("float32", 5, 2, 100, 17, act("gelu_tanh"), gated=False), FUSED),
    "no gate, biases": Small(
        block("float32", 7, 3, 33, 65, act("relu", "before"), gated=False, **BIASES), LOOP
    ),
    "no gate, clamped after": Small(
        block("float32", 4, 4, 3, 100, act("relu2", "after"), gated=False, down_bias=True), GATHER
    ),
    "clamped swiglu": Small(
        block("float32", 6, 2, 20, 9, act("silu", "before", alpha=1.7, up_offset=1.0), **BIASES),
        (*FUSED, *LOOP),
    ),
    "weighted input": Small(
        block("float32", 4, 2, 100, 3, gate_up_bias=True, router={"apply_to": ApplyTo.INPUT}),
        (*FUSED, *GATHER),
    ),
    "softmax of the selected": Small(
        block("float32", 8, 3, 24, 13, act("relu"), gated=False, **BIASES, router={
            "score": Score.NONE, "weight_source": WeightSource.SOFTMAX_SELECTED,
        }), GATHER,
    ),
    # Both matmuls are split along K where an expert is wide.
    "split along K": Small(block("float32", 2, 1, 1300, 1301, down_bias=True)),
    "many experts": Small(block("float32", 65, 8, 8, 9), (*FUSED, *LOOP)),
    "bfloat16": Small(block("bfloat16", 5, 3, 17, 33, **BIASES)),
    "bfloat16 weighted input": Small(
        block("bfloat16", 4, 2, 35, 20, act("gelu_erf"), router={"apply_to": ApplyTo.INPUT}), LOOP
    ),
    "float16": Small(
        block("float16", 5, 2, 33, 17, act("silu", "after"), **BIASES), (*FUSED, *GATHER)
    ),
    "norms": Small(
        block("float16", 6, 2, 19, 7, shared=SHARED, norms=NORMS, router={
            "score": Score.SIGMOID, "renorm": Renorm.SUM, "scale": 2.5, "logit_bias": True,
            "scale_on": ScaleOn.ROUTED_SUM,
        }), GATHER,
    ),
    "latent, normed experts": Small(
        block("float32", 5, 2, 40, 11, latent_size=13, down_bias=True, norms=BlockNorms(
            latent_input=NormSpec(), expert_output=NormSpec(offset=1.0),
        )), (*FUSED, *GATHER),
    ),
    "zero experts": Small(
        block("float32", 5, 3, 18, 10, zero_experts=4, shared=MIXED, output_bias=True, router={
            "scale": 1.5, "scale_on": ScaleOn.ROUTED_SUM,
        }), LOOP,
    ),
    "mixed dtypes": Small(
        block("bfloat16", 4, 2, 21, 10, shared=SHARED, weight_dtypes=(
            ("down", "float32"), ("router", "float32"), ("shared_router", "float16"),
        )), FUSED,
    ),
}  # fmt: skip
PAIRS = [(name, schedule) for name, small in CASES.items() for schedule in small.schedules]
