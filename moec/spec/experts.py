"""The experts, routed and shared, and their activation, as data."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import check, finite, whole
from .kinds import Clamp, Nonlinearity, SharedGate
from .router import MAX_EXPERTS, MAX_TOP_K

MAX_WIDTH = 1 << 20


@dataclass(frozen=True)
class ActivationSpec:
    """a = f(alpha-scaled gate) * (up + up_offset), with optional clamping.

    silu is g * sigmoid(alpha * g). A layer without gate applies the function to its only
    projection. `gate_cap` bounds the linear factor of silu only, cap(g) * sigmoid(alpha * g)
    with cap(v) = c * tanh(v / c), and `up_cap` bounds up in the same way.
    """

    kind: Nonlinearity = Nonlinearity.SILU
    alpha: float = 1.0
    clamp: Clamp = Clamp.NONE
    limit: float = 0.0
    up_offset: float = 0.0
    gate_cap: float | None = None
    up_cap: float | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "limit", "up_offset"):
            finite(getattr(self, name), f"activation.{name}")
        for name in ("gate_cap", "up_cap"):
            cap = getattr(self, name)
            if cap is not None:
                finite(cap, f"activation.{name}")
                check(cap > 0, f"activation.{name}", "a soft cap must be positive")
        silu = self.gate_cap is None or self.kind is Nonlinearity.SILU
        check(silu, "activation.gate_cap", "only silu has a linear factor to cap")
        if self.clamp is not Clamp.NONE:
            check(self.limit > 0, "activation.limit", "a clamp needs a positive limit")


@dataclass(frozen=True)
class ExpertsSpec:
    """The routed experts: y_t = sum_k w_tk * down_e(act(gate_e x_t, up_e x_t)).

    With `latent_size` M the experts live in M dimensions: y_t = latent_out(sum_k w_tk *
    expert_e(latent_in(x_t))). Ids from num_experts on, up to num_experts + zero_experts, are
    zero experts: they have no weights and pass x_t itself.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gated: bool = True
    activation: ActivationSpec = ActivationSpec()
    gate_up_bias: bool = False
    down_bias: bool = False
    latent_size: int | None = None
    zero_experts: int = 0

    def __post_init__(self) -> None:
        whole(self.num_experts, "experts.num_experts", 1, MAX_EXPERTS)
        whole(self.top_k, "experts.top_k", 1, MAX_TOP_K)
        whole(self.hidden_size, "experts.hidden_size", 1, MAX_WIDTH)
        whole(self.intermediate_size, "experts.intermediate_size", 1, MAX_WIDTH)
        if self.latent_size is not None:
            whole(self.latent_size, "experts.latent_size", 1, MAX_WIDTH)
        whole(self.zero_experts, "experts.zero_experts", 0, MAX_EXPERTS)
        elements = self.num_experts * self.intermediate_size * self.width
        check(elements < 1 << 40, "experts", "E * I * H overflows 2^40 elements")

    @property
    def gate_up_rows(self) -> int:
        """Output rows of the first projection: 2I with a gate, I without."""
        return (2 if self.gated else 1) * self.intermediate_size

    @property
    def width(self) -> int:
        """The width of the rows that experts read and write: H, or M with latent projections."""
        return self.latent_size or self.hidden_size


@dataclass(frozen=True)
class SharedExpertSpec:
    """A dense MLP that every token passes; y = routed + scale * shared, or as `gate` says.

    With `own_input` it reads a second input of the block, `shared_x` [T, H], instead of x.
    """

    intermediate_size: int
    activation: ActivationSpec = ActivationSpec()
    gate: SharedGate = SharedGate.NONE
    gated: bool = True  # has a gate projection, as the experts usually have
    scale: float = 1.0
    own_input: bool = False

    def __post_init__(self) -> None:
        whole(self.intermediate_size, "shared.intermediate_size", 1, MAX_WIDTH)
        finite(self.scale, "shared.scale")

    @property
    def gate_up_rows(self) -> int:
        """Output rows of the first projection: 2F with a gate, F without."""
        return (2 if self.gated else 1) * self.intermediate_size
