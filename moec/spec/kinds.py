"""The closed vocabularies of a spec: one enum for each choice that a family makes."""

from __future__ import annotations

import enum


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
