"""The blocks that run on a GPU, and the schedules of each, in sizes even and odd.

Needs neither the compiler nor a GPU. Errors are |got - want| / |want| in the norm against
float64 NumPy on the same rounded inputs. bfloat16 rounds h, the rows of a sum and the output,
float16 likewise with 3 more bits; their activation is the tanh instruction, good to 2^-11.
float32 is summed in an order of our own.
"""

from __future__ import annotations

from typing import Any

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
    ScaleOn,
    Score,
    Selection,
    SharedExpertSpec,
    SharedGate,
    WeightSource,
)

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}
TOKENS = (0, 1, 2, 7, 33, 257, 2048)
HOPPER = ("gather", "stream16", "stream32", "stream64", "stream160")
ALL = (*HOPPER, "mma16", "mma64", "simple", "loop")
SOME = ("stream16", "stream64", "stream160", "mma16", "mma64")
PLAIN = ("plain", "loop")
Row = tuple[MoESpec, tuple[str, ...]]

SWIGLU = ActivationSpec()
CLAMPED = ActivationSpec(Nonlinearity.SILU, 1.702, Clamp.BEFORE, 0.8, 1.0)
CAPPED = ActivationSpec(gate_cap=0.7, up_cap=0.5)
ON_SUM: dict[str, Any] = {"scale": 2.5, "scale_on": ScaleOn.ROUTED_SUM}
MIXED = SharedExpertSpec(
    96, ActivationSpec(Nonlinearity.RELU2), SharedGate.SOFTMAX, gated=False, scale=0.5,
    own_input=True,
)  # fmt: skip
NORMS = BlockNorms(
    router_input=NormSpec(1e-5, True, 0.25),
    experts_input=NormSpec(),
    experts_output=NormSpec(1e-3, offset=1.0),
    shared_input=NormSpec(weighted=False),
    shared_output=NormSpec(vector_first=True),
    block_output=NormSpec(scale=2.0),
    residual=True,
)


def block(
    dtype: str, e: int, k: int, h: int, i: int, act: ActivationSpec = SWIGLU, **more: Any
) -> MoESpec:
    """A block; `more` are `router`, fields of the block itself, or fields of its experts.

    Its logits are float32: rounded ones would tie, and a tie is for either side to break.
    """
    router = RouterSpec(
        e + more.get("zero_experts", 0), k, logits_dtype=Precision.FLOAT32,
        **{"renorm": Renorm.SUM, **more.pop("router", {})},
    )  # fmt: skip
    outer = {
        n: more.pop(n) for n in ("shared", "norms", "weight_dtypes", "output_bias") if n in more
    }
    return MoESpec(dtype, router, ExpertsSpec(e, k, h, i, activation=act, **more), **outer)


# In an artifact for sm_90a, one layer each.
CASES: dict[str, Row] = {
    "swiglu": (block("bfloat16", 16, 4, 256, 192), ALL),
    "float16, biases, clamp": (
        block("float16", 8, 2, 256, 192, CLAMPED, gate_up_bias=True, down_bias=True, router={
            "score": Score.NONE, "weight_source": WeightSource.SOFTMAX_SELECTED,
            "logit_bias": True, "renorm": Renorm.NONE,
        }), ALL,
    ),
    "groups, shared expert": (
        block("bfloat16", 32, 8, 256, 64, shared=SharedExpertSpec(128, gate=SharedGate.SIGMOID),
              router={"score": Score.SIGMOID, "selection_bias": True,
                      "groups": GroupSpec(8, 4), **ON_SUM}),
        ("gather", "stream16", "stream160", "mma16"),
    ),
    "no gate, sparsemixer": (
        block("bfloat16", 8, 2, 192, 128, ActivationSpec(Nonlinearity.RELU2), gated=False, router={
            "score": Score.NONE, "selection": Selection.SPARSEMIXER, "renorm": Renorm.NONE,
            "weight_source": WeightSource.SPARSEMIXER, "sparsemixer_eps": 0.01,
        }), ("gather", "stream32", "stream160", "mma64"),
    ),
    "odd widths": (
        block("bfloat16", 12, 3, 264, 200, ActivationSpec(Nonlinearity.GELU_TANH)), SOME
    ),
    "weighted input": (
        block("bfloat16", 16, 1, 256, 128, shared=SharedExpertSpec(128), router={
            "score": Score.SIGMOID, "renorm": Renorm.NONE, "apply_to": ApplyTo.INPUT,
        }), ("stream16", "stream160", "mma64", "simple", "loop"),
    ),
    "weighted inputs": (
        block("bfloat16", 6, 2, 72, 40, router={"apply_to": ApplyTo.INPUT}), PLAIN
    ),
    "latent, normed, zero experts": (
        block("bfloat16", 10, 3, 256, 64, CAPPED, latent_size=128, zero_experts=6, shared=MIXED,
              output_bias=True, norms=BlockNorms(
                  latent_input=NormSpec(), expert_output=NormSpec(offset=1.0)),
              router={"renorm": Renorm.CLAMPED_SUM, "renorm_epsilon": 0.5, **ON_SUM}),
        ("stream16", "stream160", "mma16", "simple", "loop"),
    ),
    "always, scales": (
        block("float32", 12, 4, 40, 24, router={
            "score": Score.SIGMOID, "always": 2, "global_scale": True, "per_expert_scale": True,
            "selection_bias": True, "scale": 1.5,
            "groups": GroupSpec(5, 2, GroupScore.SUM_TOP2, Masked.ZERO, False),
        }), PLAIN,
    ),
    "token table": (
        block("float32", 8, 2, 36, 20, ActivationSpec(Nonlinearity.GELU_ERF), router={
            "score": Score.SQRT_SOFTPLUS, "selection": Selection.TOKEN_TABLE, "vocab_size": 50,
        }), PLAIN,
    ),
    "norms": (
        block("float32", 6, 2, 60, 28, shared=SharedExpertSpec(20), norms=NORMS,
              router={"score": Score.SIGMOID, "logit_cap": 1.5, "logit_scale": 0.5, **ON_SUM}),
        PLAIN,
    ),
    "odd, latent, float32": (
        block("float32", 5, 2, 37, 19, CAPPED, latent_size=13, zero_experts=3, shared=MIXED,
              output_bias=True, norms=BlockNorms(
                  latent_input=NormSpec(vector_first=True), expert_output=NormSpec()),
              router={"renorm": Renorm.P_NORM, "renorm_p": 2.0}),
        (*PLAIN, "simple"),
    ),
    "mixed dtypes": (
        block("bfloat16", 4, 2, 48, 40, shared=SharedExpertSpec(21), weight_dtypes=(
            ("down", "float32"), ("router", "float32"), ("shared_gate_up", "float16"),
        )), PLAIN,
    ),
    "one expert": (block("bfloat16", 1, 1, 128, 64), ("gather", *SOME)),
    "uneven columns": (block("bfloat16", 4, 2, 2176, 64), ("gather", "stream16")),
    "many experts": (
        block("bfloat16", 384, 8, 64, 64), ("gather", "stream16", "stream160")
    ),
    # at 2^16 tokens its sorted rows have 2^31 values
    "wide rows": (block("bfloat16", 8, 8, 4096, 64), ("stream16", "stream160", "mma64")),
    "no gate, clamped after": (
        block("float16", 7, 3, 128, 64, ActivationSpec(Nonlinearity.RELU, clamp=Clamp.AFTER,
              limit=0.5), gated=False, down_bias=True),
        ("gather", "stream64", "stream160", "mma16"),
    ),
}  # fmt: skip

# In an artifact of PTX for compute_80, which the driver translates for the GPU at hand: the
# kernels of the cubins for sm_80 and sm_89, instruction by instruction before translation.
PORTABLE: dict[str, Row] = {
    name: (spec, tuple(n for n in schedules if n in ("mma16", "mma64", "plain", "loop")))
    for name, (spec, schedules) in CASES.items()
    if {"mma16", "mma64", "plain"} & {*schedules}
}
# In an artifact with compact weights: the cases that have them, and one whose weights are not
# all of a size, so that some are exceptions and a strip has more of them than it has room for.
UNEVEN = "uneven weights"
WIDE = "stream256"  # which plain weights have not
COMPACT: dict[str, Row] = {
    name: (spec, tuple(
        n for n in (*schedules, WIDE if "stream160" in schedules else "") if n in (*HOPPER, WIDE)
    ))
    for name, (spec, schedules) in CASES.items()
    if spec.dtype == "bfloat16" and {*schedules} & {*HOPPER}
    and not (spec.experts.width % 64 or spec.experts.intermediate_size % 64)
}  # fmt: skip
COMPACT[UNEVEN] = (block("bfloat16", 16, 4, 256, 192), (*HOPPER, WIDE))
# In an artifact with both forms, of which every schedule reads one.
BOTH = {name: CASES[name] for name in ("swiglu", "groups, shared expert")}
# What an artifact is compiled for, and its layers.
ARTIFACTS = {
    "hopper": ("cuda:sm_90a", CASES),
    "compact": ("cuda:sm_90a-compact", COMPACT),
    "both": ("cuda:sm_90a-both", BOTH),
    "portable": ("cuda:compute_80", PORTABLE),
}
