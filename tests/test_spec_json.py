"""MoESpec as plain data: what was written comes back, and nothing else is taken."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from moec.errors import BadSpec
from moec.spec import (
    BlockNorms,
    ExpertsSpec,
    GroupSpec,
    MoESpec,
    NormSpec,
    Renorm,
    RouterSpec,
    Score,
    SharedExpertSpec,
    SharedGate,
)

SPEC = MoESpec(
    "bfloat16",
    RouterSpec(8, 2, Score.SIGMOID, selection_bias=True, groups=GroupSpec(4, 2),
               renorm=Renorm.SUM, renorm_epsilon=1e-20, scale=2.5),
    ExpertsSpec(8, 2, 16, 24, gate_up_bias=True),
    SharedExpertSpec(48, gate=SharedGate.SIGMOID),
    BlockNorms(router_input=NormSpec(1e-5, scale=0.25), residual=True),
    (("router", "float32"),),
)  # fmt: skip


def test_round_trip() -> None:
    text = json.dumps(SPEC.to_json(), sort_keys=True)
    assert MoESpec.from_json(json.loads(text)) == SPEC
    assert hash(MoESpec.from_json(json.loads(text))) == hash(SPEC)


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


ROWS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown field": (put("router", "colour", value=1), "spec.router: unknown field 'colour'"),
    "unknown score": (put("router", "score", value="max"), "spec.router.score: 'max' is unknown"),
    "missing": (lambda data: data["experts"].pop("top_k"), "spec.experts: "),
    "not a table": (put("router", value=[1]), "spec.router: expected an object, got list"),
    "flag as text": (
        put("experts", "gated", value="false"),
        "spec.experts.gated: 'false' is neither true nor false",
    ),
    "flag as number": (put("router", "logit_bias", value=1), "spec.router.logit_bias: 1 is nei"),
    "pairs": (put("weight_dtypes", value=5), "spec.weight_dtypes: 5 is no list of pairs"),
    "no pairs": (put("weight_dtypes", value=[["a"]]), "spec.weight_dtypes: [['a']] is no list"),
    "dtype": (put("weight_dtypes", value=[["router", "int4"]]), "'int4' is not supported"),
    "no matrix": (put("weight_dtypes", value=[["bias", "float32"]]), "'bias' is not a matrix"),
}


@pytest.mark.parametrize("row", ROWS)
def test_refused(row: str) -> None:
    change, message = ROWS[row]
    data = json.loads(json.dumps(SPEC.to_json()))
    change(data)
    with pytest.raises(BadSpec) as caught:
        MoESpec.from_json(data)
    assert message in caught.value.message and caught.value.where in caught.value.message


NUMBERS: dict[str, tuple[type, dict[str, Any], str]] = {
    "E zero": (RouterSpec, {"num_experts": 0}, "router.num_experts: 0 is outside [1, 65536]"),
    "E many": (RouterSpec, {"num_experts": 65537}, "router.num_experts: 65537 is outside"),
    "K zero": (RouterSpec, {"top_k": 0}, "router.top_k: 0 is outside [1, 64]"),
    "K many": (RouterSpec, {"num_experts": 99, "top_k": 65}, "router.top_k: 65 is outside"),
    "K over E": (RouterSpec, {"top_k": 9}, "9 experts per token cannot be chosen of 8"),
    "K true": (RouterSpec, {"top_k": True}, "router.top_k: True is not an integer"),
    "scale NaN": (RouterSpec, {"scale": float("nan")}, "router.scale: nan is not a finite"),
    "cap": (RouterSpec, {"logit_cap": -1.0}, "router.logit_cap: a soft cap must be positive"),
    "groups": (RouterSpec, {"groups": GroupSpec(3, 1)}, "3 groups do not divide 8 experts"),
    "kept": (RouterSpec, {"top_k": 3, "groups": GroupSpec(4, 1)}, "hold fewer than top_k=3"),
    "pairs of one": (RouterSpec, {"groups": GroupSpec(8, 4)}, "sum_top2 needs two experts"),
    "no score": (RouterSpec, {"score": Score.NONE}, "there is no score to take weights from"),
    "H zero": (ExpertsSpec, {"hidden_size": 0}, "experts.hidden_size: 0 is outside"),
    "I float": (ExpertsSpec, {"intermediate_size": 2.0}, "2.0 is not an integer"),
    "product": (
        ExpertsSpec,
        {"num_experts": 65536, "hidden_size": 1 << 13, "intermediate_size": 1 << 11},
        "E * I * H overflows 2^40 elements",
    ),
}


@pytest.mark.parametrize("row", NUMBERS)
def test_sizes(row: str) -> None:
    kind, changes, message = NUMBERS[row]
    base = {"num_experts": 8, "top_k": 2}
    if kind is ExpertsSpec:
        base |= {"hidden_size": 16, "intermediate_size": 24}
    kind(**base)
    with pytest.raises(BadSpec) as caught:
        kind(**{**base, **changes})
    assert message in caught.value.message


def test_groups_to_keep() -> None:
    with pytest.raises(BadSpec, match="topk_group > n_group"):
        GroupSpec(4, 5)


def test_parameters_have_the_dtypes_of_the_file() -> None:
    table = SPEC.parameters()
    assert table["router"].dtype == "float32" and table["gate_up"].dtype == "bfloat16"
    assert table["gate_up"].shape == (8, 48, 16) and table["down"].shape == (8, 16, 24)
    assert table["selection_bias"].dtype == "float32"
    assert "down_bias" not in table
    plain = dataclasses.replace(SPEC, shared=None, norms=BlockNorms(), weight_dtypes=())
    assert "shared_gate_up" not in plain.parameters()
