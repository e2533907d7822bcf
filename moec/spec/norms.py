"""The RMSNorms that belong to a block, as data."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .checks import check, finite


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm in float32: x * (mean(x^2) + eps)^-0.5, times a vector when `weighted`.

    `offset` is added to the stored vector. With `vector_first` x is multiplied by the vector
    before it is normalised.
    """

    eps: float = 1e-6
    weighted: bool = True
    scale: float = 1.0  # constant factor after the vector
    offset: float = 0.0
    vector_first: bool = False

    def __post_init__(self) -> None:
        for name in ("eps", "scale", "offset"):
            finite(getattr(self, name), f"norm.{name}")
        check(
            not self.vector_first or (self.weighted and self.scale == 1.0),
            "norm.vector_first",
            "needs a vector, and no constant factor",
        )


@dataclass(frozen=True)
class BlockNorms:
    """RMSNorms that belong to the block, by position; None = no norm there.

    latent_input follows the projection into the latent width; expert_output is applied to the
    output row of every expert, before its routing weight. With `residual` the block's input
    is the residual stream h and its output h + block_output(shared + routed) (gemma4).
    """

    router_input: NormSpec | None = None
    experts_input: NormSpec | None = None
    experts_output: NormSpec | None = None
    shared_input: NormSpec | None = None
    shared_output: NormSpec | None = None
    block_output: NormSpec | None = None
    residual: bool = False
    latent_input: NormSpec | None = None
    expert_output: NormSpec | None = None


NORM_POSITIONS = tuple(f.name for f in fields(BlockNorms) if f.name != "residual")
LATENT_POSITIONS = ("latent_input", "expert_output")
