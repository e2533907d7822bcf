"""From the router's input to topk_ids and topk_weights, as data."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import check, finite, whole
from .kinds import (
    ApplyTo,
    GroupScore,
    Masked,
    Precision,
    Renorm,
    ScaleOn,
    Score,
    Selection,
    WeightSource,
)

MAX_EXPERTS = 65536
MAX_TOP_K = 64
MAX_VOCABULARY = 1 << 24


@dataclass(frozen=True)
class GroupSpec:
    """Expert groups: the best `kept` of `count` equal groups stay selectable."""

    count: int
    kept: int
    score: GroupScore = GroupScore.SUM_TOP2
    masked: Masked = Masked.MINUS_INF
    biased: bool = True  # group scores from the biased value (else from the plain score)

    def __post_init__(self) -> None:
        whole(self.count, "router.groups.count", 1, MAX_EXPERTS)
        whole(self.kept, "router.groups.kept", 1, MAX_EXPERTS)
        check(
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
        whole(self.num_experts, "router.num_experts", 1, MAX_EXPERTS)
        whole(self.top_k, "router.top_k", 1, MAX_TOP_K)
        check(
            self.top_k <= self.num_experts,
            "router.top_k",
            f"{self.top_k} experts per token cannot be chosen of {self.num_experts}",
        )
        for name in ("logit_scale", "sparsemixer_eps", "renorm_epsilon", "renorm_p", "scale"):
            finite(getattr(self, name), f"router.{name}")
        if self.logit_cap is not None:
            finite(self.logit_cap, "router.logit_cap")
            check(self.logit_cap > 0, "router.logit_cap", "a soft cap must be positive")
        if self.groups is not None:
            size, rest = divmod(self.selectable, self.groups.count)
            check(
                rest == 0,
                "router.groups.count",
                f"{self.groups.count} groups do not divide {self.selectable} experts",
            )
            check(
                size * self.groups.kept >= self.selected,
                "router.groups.kept",
                f"{self.groups.kept} groups of {size} experts hold fewer than top_k={self.top_k}",
            )
            if self.groups.score is GroupScore.SUM_TOP2:
                check(size >= 2, "router.groups.count", "sum_top2 needs two experts a group")
        mixers = (
            self.selection is Selection.SPARSEMIXER,
            (self.weight_source is WeightSource.SPARSEMIXER),
        )
        check(mixers[0] == mixers[1], "router.weight_source", "sparsemixer selects and weighs")
        if mixers[0]:
            check(self.top_k == 2, "router.top_k", "sparsemixer is defined for top_k = 2 only")
            check(self.groups is None, "router.groups", "sparsemixer knows no groups")
            check(not self.selection_bias, "router.selection_bias", "sparsemixer knows no bias")
        if self.score is Score.NONE and self.weight_source is WeightSource.SCORE:
            check(False, "router.weight_source", "there is no score to take weights from")
        whole(self.always, "router.always", 0, self.top_k - 1)
        check(
            not self.always or self.selection is Selection.TOP_K,
            "router.always",
            "only with top_k selection",
        )
        table = self.selection is Selection.TOKEN_TABLE
        whole(self.vocab_size, "router.vocab_size", int(table), MAX_VOCABULARY if table else 0)
        check(
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
