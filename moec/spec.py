"""What one MoE block computes, as frozen dataclasses: mathematics only.

No file layout, no tensor names, no target. Every field is validated when the value is
made; the message of a `BadSpec` names the field. Symbols used in the whole project:

    T tokens   E experts   K experts per token (top_k)   H hidden size
    I intermediate size of an expert   S = T*K rows   F width of the shared expert

Canonical weights are output-major: gate_up [E, 2I, H] (gate rows first, then up rows),
down [E, H, I]. The routing vocabulary follows vLLM's RoutingMethodType where it has a name.
"""

from __future__ import annotations

import enum
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import BadSpec

MAX_EXPERTS = 65536
MAX_TOP_K = 64
MAX_WIDTH = 1 << 20
MAX_VOCABULARY = 1 << 24
FLOAT_DTYPES = ("float32", "bfloat16", "float16")


class Score(str, enum.Enum):
    """What the logits become before selection, over all experts, in float32."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SQRT_SOFTPLUS = "sqrt_softplus"
    NONE = "none"


class Selection(str, enum.Enum):
    """How K experts are chosen. Among equal values the lowest id wins."""

    TOP_K = "top_k"
    SPARSEMIXER = "sparsemixer"
    TOKEN_TABLE = "token_table"  # a row of a [V, K] table, by the id of the input token


class WeightSource(str, enum.Enum):
    """What the weight of a selected expert is, before renormalisation."""

    SCORE = "score"
    SOFTMAX_SELECTED = "softmax_selected"
    SIGMOID_SELECTED = "sigmoid_selected"
    SPARSEMIXER = "sparsemixer"


class Renorm(str, enum.Enum):
    """How the K weights of a token are renormalised."""

    NONE = "none"
    SUM = "sum"  # w / (sum(w) + epsilon)
    CLAMPED_SUM = "clamped_sum"  # w / max(sum(w), epsilon)
    P_NORM = "p_norm"  # w / (sum(|w|^p))^(1/p)


class GroupScore(str, enum.Enum):
    """What a group of experts is worth when groups are chosen first."""

    MAX = "max"
    SUM_TOP2 = "sum_top2"


class Masked(str, enum.Enum):
    """What the experts of a group that was not kept are worth in the selection."""

    MINUS_INF = "-inf"
    ZERO = "0"


class Precision(str, enum.Enum):
    """To which precision an intermediate of the routing is rounded."""

    MODEL = "model"
    FLOAT32 = "float32"


class ApplyTo(str, enum.Enum):
    """Where the routing weight of an expert multiplies."""

    OUTPUT = "output"
    INPUT = "input"


class ScaleOn(str, enum.Enum):
    """Where the constant routing scale multiplies."""

    WEIGHTS = "weights"
    ROUTED_SUM = "routed_sum"


class Nonlinearity(str, enum.Enum):
    """The function on the gate (or on the only projection of a layer without gate)."""

    SILU = "silu"
    GELU_ERF = "gelu_erf"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    RELU2 = "relu2"


class Clamp(str, enum.Enum):
    """Where `limit` clamps: gate to at most limit, up to [-limit, limit]."""

    NONE = "none"
    BEFORE = "before"  # before the nonlinearity
    AFTER = "after"  # the result of the nonlinearity


class SharedGate(str, enum.Enum):
    """What multiplies the shared expert's output."""

    NONE = "none"
    SIGMOID = "sigmoid"  # sigmoid(x @ shared_router^T), one scalar a token
    SOFTMAX = "softmax"  # c = softmax(x @ shared_router^T + b) [2]: c0 * routed + c1 * shared


def _check(ok: bool, field: str, message: str) -> None:
    if not ok:
        raise BadSpec(f"{field}: {message}", where=field)


def _int(value: Any, field: str, low: int, high: int) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool)
    _check(ok, field, f"{value!r} is not an integer")
    _check(low <= value <= high, field, f"{value} is outside [{low}, {high}]")


def _finite(value: Any, field: str) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    _check(ok, field, f"{value!r} is not a finite number")


@dataclass(frozen=True)
class GroupSpec:
    """Expert groups: the best `kept` of `count` equal groups stay selectable."""

    count: int
    kept: int
    score: GroupScore = GroupScore.SUM_TOP2
    masked: Masked = Masked.MINUS_INF
    biased: bool = True  # group scores from the biased value (else from the plain score)

    def __post_init__(self) -> None:
        _int(self.count, "router.groups.count", 1, MAX_EXPERTS)
        _int(self.kept, "router.groups.kept", 1, MAX_EXPERTS)
        _check(
            self.kept <= self.count,
            "router.groups.kept",
            f"{self.kept} groups cannot be kept of {self.count} (topk_group > n_group)",
        )


@dataclass(frozen=True)
class RouterSpec:
    """From the router's input [T, H] to topk_ids and topk_weights [T, K].

    logits = cap(scale * (x @ router^T + bias)), rounded to `logits_dtype`; score; choice =
    score + selection bias; groups; selection; weights; renormalisation; scale; rounding to
    `weights_dtype`. Selection bias never enters the weights.

    `num_experts` counts the rows of the router: the experts with weights, the zero experts
    (see ExpertsSpec), and the last `always` experts, which every token passes and which take
    part in the renormalisation: top_k - always are selected among the others, then the always
    ones follow in ascending order. `global_scale` multiplies the weights by a stored scalar.
    """

    num_experts: int
    top_k: int
    score: Score = Score.SOFTMAX
    logits_dtype: Precision = Precision.MODEL
    logit_bias: bool = False
    logit_scale: float = 1.0
    logit_cap: float | None = None  # c * tanh(logits / c)
    selection_bias: bool = False
    groups: GroupSpec | None = None
    selection: Selection = Selection.TOP_K
    sparsemixer_eps: float = 0.0
    weight_source: WeightSource = WeightSource.SCORE
    renorm: Renorm = Renorm.NONE
    renorm_epsilon: float = 0.0
    renorm_p: float = 1.0
    scale: float = 1.0
    scale_on: ScaleOn = ScaleOn.WEIGHTS
    per_expert_scale: bool = False
    global_scale: bool = False
    always: int = 0
    vocab_size: int = 0  # rows of the token table
    weights_dtype: Precision = Precision.FLOAT32
    apply_to: ApplyTo = ApplyTo.OUTPUT

    def __post_init__(self) -> None:
        _int(self.num_experts, "router.num_experts", 1, MAX_EXPERTS)
        _int(self.top_k, "router.top_k", 1, MAX_TOP_K)
        _check(
            self.top_k <= self.num_experts,
            "router.top_k",
            f"{self.top_k} experts per token cannot be chosen of {self.num_experts}",
        )
        for name in ("logit_scale", "sparsemixer_eps", "renorm_epsilon", "renorm_p", "scale"):
            _finite(getattr(self, name), f"router.{name}")
        if self.logit_cap is not None:
            _finite(self.logit_cap, "router.logit_cap")
            _check(self.logit_cap > 0, "router.logit_cap", "a soft cap must be positive")
        if self.groups is not None:
            size, rest = divmod(self.selectable, self.groups.count)
            _check(
                rest == 0,
                "router.groups.count",
                f"{self.groups.count} groups do not divide {self.selectable} experts",
            )
            _check(
                size * self.groups.kept >= self.selected,
                "router.groups.kept",
                f"{self.groups.kept} groups of {size} experts hold fewer than top_k={self.top_k}",
            )
            if self.groups.score is GroupScore.SUM_TOP2:
                _check(size >= 2, "router.groups.count", "sum_top2 needs two experts a group")
        mixers = (
            self.selection is Selection.SPARSEMIXER,
            (self.weight_source is WeightSource.SPARSEMIXER),
        )
        _check(mixers[0] == mixers[1], "router.weight_source", "sparsemixer selects and weighs")
        if mixers[0]:
            _check(self.top_k == 2, "router.top_k", "sparsemixer is defined for top_k = 2 only")
            _check(self.groups is None, "router.groups", "sparsemixer knows no groups")
            _check(not self.selection_bias, "router.selection_bias", "sparsemixer knows no bias")
        if self.score is Score.NONE and self.weight_source is WeightSource.SCORE:
            _check(False, "router.weight_source", "there is no score to take weights from")
        _int(self.always, "router.always", 0, self.top_k - 1)
        _check(
            not self.always or self.selection is Selection.TOP_K,
            "router.always",
            "only with top_k selection",
        )
        table = self.selection is Selection.TOKEN_TABLE
        _int(self.vocab_size, "router.vocab_size", int(table), MAX_VOCABULARY if table else 0)
        _check(
            not table or (self.groups is None and not self.selection_bias),
            "router.selection",
            "a token table knows neither groups nor bias",
        )

    @property
    def selectable(self) -> int:
        """How many experts take part in the selection."""
        return self.num_experts - self.always

    @property
    def selected(self) -> int:
        """How many experts are selected for a token, without the `always` ones."""
        return self.top_k - self.always


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
            _finite(getattr(self, name), f"activation.{name}")
        for name in ("gate_cap", "up_cap"):
            cap = getattr(self, name)
            if cap is not None:
                _finite(cap, f"activation.{name}")
                _check(cap > 0, f"activation.{name}", "a soft cap must be positive")
        silu = self.gate_cap is None or self.kind is Nonlinearity.SILU
        _check(silu, "activation.gate_cap", "only silu has a linear factor to cap")
        if self.clamp is not Clamp.NONE:
            _check(self.limit > 0, "activation.limit", "a clamp needs a positive limit")


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
        _int(self.num_experts, "experts.num_experts", 1, MAX_EXPERTS)
        _int(self.top_k, "experts.top_k", 1, MAX_TOP_K)
        _int(self.hidden_size, "experts.hidden_size", 1, MAX_WIDTH)
        _int(self.intermediate_size, "experts.intermediate_size", 1, MAX_WIDTH)
        if self.latent_size is not None:
            _int(self.latent_size, "experts.latent_size", 1, MAX_WIDTH)
        _int(self.zero_experts, "experts.zero_experts", 0, MAX_EXPERTS)
        elements = self.num_experts * self.intermediate_size * self.width
        _check(elements < 1 << 40, "experts", "E * I * H overflows 2^40 elements")

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
        _int(self.intermediate_size, "shared.intermediate_size", 1, MAX_WIDTH)
        _finite(self.scale, "shared.scale")

    @property
    def gate_up_rows(self) -> int:
        """Output rows of the first projection: 2F with a gate, F without."""
        return (2 if self.gated else 1) * self.intermediate_size


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
            _finite(getattr(self, name), f"norm.{name}")
        _check(
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
    norms: BlockNorms = BlockNorms()
    weight_dtypes: tuple[tuple[str, str], ...] = ()
    output_bias: bool = False  # one [H] vector added to the block's output

    def __post_init__(self) -> None:
        _check(self.dtype in FLOAT_DTYPES, "dtype", f"{self.dtype!r} is none of {FLOAT_DTYPES}")
        _check(
            self.router.top_k == self.experts.top_k, "experts.top_k", "differs from router.top_k"
        )
        _check(
            self.router.num_experts == self.experts.num_experts + self.experts.zero_experts,
            "experts.num_experts",
            "with the zero experts differs from router.num_experts",
        )
        on_input = self.router.apply_to is ApplyTo.INPUT
        _check(
            not (on_input and self.experts.zero_experts),
            "router.apply_to",
            "the weight of a zero expert applies to its output",
        )
        latent = self.experts.latent_size is not None
        _check(
            latent or self.norms.latent_input is None,
            "norms.latent_input",
            "there is no latent projection",
        )
        known = set(self._matrices())
        for name, dtype in self.weight_dtypes:
            _check(name in known, "weight_dtypes", f"{name!r} is not a matrix of this block")
            _check(dtype in FLOAT_DTYPES, f"weight_dtypes.{name}", f"{dtype!r} is not supported")

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
        data: dict[str, Any] = _plain(asdict(self))
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> MoESpec:
        """The inverse of `to_json`; raises BadSpec on unknown or missing fields."""
        spec: MoESpec = restore(MoESpec, data)
        return spec


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


# Nested types by field name: annotations are strings at run time, and this table is
# shorter and stricter than evaluating them.
_NESTED: dict[str, Any] = {
    "router": RouterSpec,
    "experts": ExpertsSpec,
    "shared": SharedExpertSpec,
    "norms": BlockNorms,
    "activation": ActivationSpec,
    "groups": GroupSpec,
    **{position: NormSpec for position in NORM_POSITIONS},
}
_ENUMS: dict[tuple[str, str], type[enum.Enum]] = {
    ("RouterSpec", "score"): Score,
    ("RouterSpec", "logits_dtype"): Precision,
    ("RouterSpec", "selection"): Selection,
    ("RouterSpec", "weight_source"): WeightSource,
    ("RouterSpec", "renorm"): Renorm,
    ("RouterSpec", "scale_on"): ScaleOn,
    ("RouterSpec", "weights_dtype"): Precision,
    ("RouterSpec", "apply_to"): ApplyTo,
    ("GroupSpec", "score"): GroupScore,
    ("GroupSpec", "masked"): Masked,
    ("ActivationSpec", "kind"): Nonlinearity,
    ("ActivationSpec", "clamp"): Clamp,
    ("SharedExpertSpec", "gate"): SharedGate,
}


def _restore(cls: Any, data: Any, path: str) -> Any:
    if not isinstance(data, dict):
        raise BadSpec(f"{path}: expected an object, got {type(data).__name__}", where=path)
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise BadSpec(f"{path}: unknown field {unknown[0]!r}", where=path)
    _flags(cls, data, path)
    values: dict[str, Any] = {}
    for name, value in data.items():
        here = f"{path}.{name}"
        kind = _ENUMS.get((cls.__name__, name))
        if kind is not None:
            try:
                values[name] = kind(value)
            except ValueError:
                allowed = ", ".join(m.value for m in kind)
                raise BadSpec(f"{here}: {value!r} is unknown", where=here, need=allowed) from None
        elif name in _NESTED and value is not None:
            values[name] = _restore(_NESTED[name], value, here)
        elif name == "weight_dtypes":
            values[name] = _pairs(value, here)
        else:
            values[name] = value
    try:
        return cls(**values)
    except TypeError as error:
        raise BadSpec(f"{path}: {error}", where=path) from None


def _flags(cls: Any, data: dict[str, Any], path: str) -> None:
    # No class checks its flags itself, and any text would count as true.
    for f in fields(cls):
        if f.type == "bool" and not isinstance(data.get(f.name, False), bool):
            here = f"{path}.{f.name}"
            raise BadSpec(f"{here}: {data[f.name]!r} is neither true nor false", where=here)


def _pairs(value: Any, path: str) -> tuple[tuple[str, str], ...]:
    try:
        return tuple((str(k), str(v)) for k, v in value)
    except (TypeError, ValueError):
        raise BadSpec(f"{path}: {value!r} is no list of pairs", where=path) from None


def restore(cls: Any, data: Any, path: str = "spec") -> Any:
    """A spec dataclass from plain data; raises BadSpec on unknown or missing fields."""
    return _restore(cls, data, path)
