"""One MoE block as data, and its canonical parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .checks import check
from .experts import ExpertsSpec, SharedExpertSpec
from .kinds import ApplyTo, Selection, SharedGate
from .norms import LATENT_POSITIONS, NORM_POSITIONS, BlockNorms
from .plain import plain, restore
from .router import RouterSpec

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
NO_NORMS = BlockNorms()


@dataclass(frozen=True)
class Parameter:
    """A canonical parameter of a block: its shape and the dtype it has on disk."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class MoESpec:
    """One MoE block: router, experts, and what surrounds them.

    `dtype` is the model's dtype: activations in and out, and what Precision.MODEL means.
    `weight_dtypes` gives the dtype on disk of every matrix parameter, by name (see
    `parameters`); vectors (biases, scales, norms) are bound as float32.
    """

    dtype: str
    router: RouterSpec
    experts: ExpertsSpec
    shared: SharedExpertSpec | None = None
    norms: BlockNorms = NO_NORMS
    weight_dtypes: tuple[tuple[str, str], ...] = ()
    output_bias: bool = False  # one [H] vector added to the block's output

    def __post_init__(self) -> None:
        check(self.dtype in FLOAT_DTYPES, "dtype", f"{self.dtype!r} is none of {FLOAT_DTYPES}")
        check(self.router.top_k == self.experts.top_k, "experts.top_k", "differs from router.top_k")
        check(
            self.router.num_experts == self.experts.num_experts + self.experts.zero_experts,
            "experts.num_experts",
            "with the zero experts differs from router.num_experts",
        )
        on_input = self.router.apply_to is ApplyTo.INPUT
        check(
            not (on_input and self.experts.zero_experts),
            "router.apply_to",
            "the weight of a zero expert applies to its output",
        )
        latent = self.experts.latent_size is not None
        check(
            latent or self.norms.latent_input is None,
            "norms.latent_input",
            "there is no latent projection",
        )
        known = set(self._matrices())
        for name, dtype in self.weight_dtypes:
            check(name in known, "weight_dtypes", f"{name!r} is not a matrix of this block")
            check(dtype in FLOAT_DTYPES, f"weight_dtypes.{name}", f"{dtype!r} is not supported")

    def _matrices(self) -> dict[str, tuple[int, ...]]:
        e = self.experts
        shapes: dict[str, tuple[int, ...]] = {
            "router": (self.router.num_experts, e.hidden_size),
            "gate_up": (e.num_experts, e.gate_up_rows, e.width),
            "down": (e.num_experts, e.width, e.intermediate_size),
        }
        if e.latent_size is not None:
            shapes["latent_in"] = (e.latent_size, e.hidden_size)
            shapes["latent_out"] = (e.hidden_size, e.latent_size)
        if self.shared is not None:
            width = self.shared.intermediate_size
            shapes["shared_gate_up"] = (self.shared.gate_up_rows, e.hidden_size)
            shapes["shared_down"] = (e.hidden_size, width)
            if self.shared.gate is not SharedGate.NONE:
                rows = 1 if self.shared.gate is SharedGate.SIGMOID else 2
                shapes["shared_router"] = (rows, e.hidden_size)
        return shapes

    def parameters(self) -> dict[str, Parameter]:
        """Every canonical parameter in a fixed order, with shape and dtype."""
        e, r = self.experts, self.router
        dtypes = dict(self.weight_dtypes)
        out = {
            name: Parameter(shape, dtypes.get(name, self.dtype))
            for name, shape in self._matrices().items()
        }
        vectors = {
            "router_bias": (r.logit_bias, (r.num_experts,)),
            "selection_bias": (r.selection_bias, (r.selectable,)),
            "per_expert_scale": (r.per_expert_scale, (r.num_experts,)),
            "global_scale": (r.global_scale, (1,)),
            "gate_up_bias": (e.gate_up_bias, (e.num_experts, e.gate_up_rows)),
            "down_bias": (e.down_bias, (e.num_experts, e.width)),
            "shared_router_bias": (
                self.shared is not None and self.shared.gate is SharedGate.SOFTMAX, (2,)
            ),
            "output_bias": (self.output_bias, (e.hidden_size,)),
        }  # fmt: skip
        for position in NORM_POSITIONS:
            norm = getattr(self.norms, position)
            width = e.width if position in LATENT_POSITIONS else e.hidden_size
            vectors[f"norm_{position}"] = (norm is not None and norm.weighted, (width,))
        for name, (present, shape) in vectors.items():
            if present:
                out[name] = Parameter(shape, "float32")
        if r.selection is Selection.TOKEN_TABLE:
            out["token_table"] = Parameter((r.vocab_size, r.top_k), "int32")
        return out

    def to_json(self) -> dict[str, Any]:
        """A plain dict for the manifest; `from_json` restores an equal value."""
        data: dict[str, Any] = plain(asdict(self))
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> MoESpec:
        """The inverse of `to_json`; raises BadSpec on unknown or missing fields."""
        spec: MoESpec = restore(MoESpec, data)
        return spec
