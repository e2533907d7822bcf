"""Which layers are MoE layers: every condition, and the same answer as transformers' models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moec.errors import BadSpec
from moec.frontend import builtin, load
from moec.frontend.layers import MAX_LAYERS, moe_layers
from moec.frontend.values import read_fields
from tests.frontend.test_family_files import QWEN
from tests.models import FAMILIES
from tests.models import moe_layers as layers_of_module

COUNT = 6
CONFIG = {
    "num_hidden_layers": COUNT, "hidden_size": 8, "moe_intermediate_size": 6, "num_experts": 4,
    "num_experts_per_tok": 2, "hidden_act": "silu", "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}  # fmt: skip
FIELDS = {
    "list": {"kind": "ints", "optional": True},
    "names": {"kind": "texts", "optional": True},
    "number": {"kind": "integer", "optional": True},
    "on": {"kind": "flag", "optional": True},
}


def layers(path: Path, rule: list[Any], **config: Any) -> tuple[int, ...]:
    data = {**QWEN, "layers": rule, "config": {**QWEN["config"], **FIELDS}}
    (path / "f.json").write_text(json.dumps(data))
    return moe_layers(read_fields(load(path / "f.json"), {**CONFIG, **config}))


def every(*conditions: dict[str, Any]) -> list[Any]:
    return [{"all": list(conditions)}]


TYPES = {"types": "$names", "moe": "sparse", "other": ["dense", "none"]}
ROWS: dict[str, tuple[list[Any], dict[str, Any], tuple[int, ...]]] = {
    "no rule": ([], {}, (0, 1, 2, 3, 4, 5)),
    "no condition": ([{}], {}, (0, 1, 2, 3, 4, 5)),
    "in": (every({"in": "$list"}), {"list": [4, 1]}, (1, 4)),
    "not in": (every({"not_in": "$list"}), {"list": [0, 5]}, (1, 2, 3, 4)),
    "not in null": (every({"not_in": "$list"}), {"list": None}, (0, 1, 2, 3, 4, 5)),
    "not in outside": (every({"not_in": "$list"}), {"list": [0, 99]}, (1, 2, 3, 4, 5)),
    "in as text": (every({"in": "$list"}), {"list": "3, 4,5"}, (3, 4, 5)),
    "period": (every({"period": 2}), {}, (0, 2, 4)),
    "period from one": (every({"period": 2, "offset": -1}), {}, (1, 3, 5)),
    "period of three": (every({"period": "$number", "offset": 1}), {"number": 3}, (1, 4)),
    "start": (every({"start": 2}), {}, (2, 3, 4, 5)),
    "end": (every({"end": 3}), {}, (0, 1, 2, 3)),
    "no end": (every({"end": -1}), {}, (0, 1, 2, 3, 4, 5)),
    "start and end": (every({"start": 1}, {"end": "$number"}), {"number": 3}, (1, 2, 3)),
    "types": (every(TYPES), {"names": ["dense", "sparse", "none", "sparse", "dense", "dense"]},
              (1, 3)),
    "more types": (every(TYPES), {"names": ["sparse"] * 9}, (0, 1, 2, 3, 4, 5)),
    "flags": (every({"flags": [0, 1, False, True, 0, 0]}), {}, (1, 3)),
    "enabled": (every({"enabled": "$on"}), {"on": True}, (0, 1, 2, 3, 4, 5)),
    "given": ([{"given": ["list"], "all": [{"in": "$list"}]}, {"all": [{"start": 4}]}],
              {"list": [0]}, (0,)),
    "not given": ([{"given": ["list"], "all": [{"in": "$list"}]}, {"all": [{"start": 4}]}],
                  {}, (4, 5)),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_conditions(tmp_path: Path, row: str) -> None:
    rule, config, expected = ROWS[row]
    assert layers(tmp_path, rule, **config) == expected


ERRORS: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "none": (every({"start": "$number"}), {"number": 6}, "none of the 6 layers is an MoE layer"),
    "disabled": (every({"enabled": "$on"}), {"on": False}, "none of the 6 layers"),
    "in outside": (every({"in": "$list"}), {"list": [6]}, "list names layer 6"),
    "in negative": (every({"in": "$list"}), {"list": [-1]}, "list names layer -1"),
    "period zero": (every({"period": "$number"}), {"number": 0}, "number: 0 is no period"),
    "short list": (every(TYPES), {"names": ["sparse"] * 5}, "names has 5 entries for 6 layers"),
    "unknown type": (every(TYPES), {"names": ["sparse"] * 5 + ["linear"]},
                     "names: 'linear' of layer 5 is not known"),
    "undecided": ([{"given": ["list"]}], {}, "does not say which layers are MoE layers"),
    "list of text": (every({"in": "$list"}), {"list": ["1"]}, "list: ['1'] is not valid"),
    "list of flags": (every({"in": "$list"}), {"list": [True]}, "list: [True] is not valid"),
    "text": (every({"in": "$list"}), {"list": "1,x"}, "list: [1, 'x'] is not valid"),
    "long list": (every({"in": "$list"}), {"list": [0] * 4097}, "list: [0, 0"),
    "many layers": ([], {"num_hidden_layers": MAX_LAYERS + 1}, "more than any model has"),
    "absurd": ([], {"num_hidden_layers": 1 << 39}, "more than any model has"),
    "many experts": ([], {"num_hidden_layers": 400, "num_experts": 60000}, "more than any model"),
}  # fmt: skip


@pytest.mark.parametrize("row", ERRORS)
def test_rules_that_say_nonsense(tmp_path: Path, row: str) -> None:
    rule, config, message = ERRORS[row]
    with pytest.raises(BadSpec) as caught:
        layers(tmp_path, rule, **config)
    assert message in caught.value.message and caught.value.where == "config.json"
    assert caught.value.need and caught.value.hint


# family -> changes of its variant "a"; the layers are those in which transformers puts experts.
MODELS: list[tuple[str, dict[str, Any]]] = [
    *[("qwen3_moe", {"num_hidden_layers": 7, "decoder_sparse_step": s, "mlp_only_layers": only})
      for s in (1, 2, 3) for only in ([], [1], [0, 5])],
    *[("qwen2_moe", {"num_hidden_layers": 5, "decoder_sparse_step": s, "mlp_only_layers": [4]})
      for s in (1, 4)],
    *[("deepseek_v3", {"num_hidden_layers": 4, "first_k_dense_replace": n}) for n in (0, 1, 3)],
    *[("llama4_text", {"num_hidden_layers": 6, "interleave_moe_layer_step": n})
      for n in (1, 2, 3)],
    *[("llama4_text", {"num_hidden_layers": 5, "moe_layers": chosen}) for chosen in ([0], [4, 2])],
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_the_layers_of_transformers(family: str, changes: dict[str, Any]) -> None:
    config_class, model_class, variants = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**variants["a"], **changes})
    with torch.device("meta"):
        module = getattr(transformers, model_class)(config)
    own = next(f for f in builtin() if f.family == family)
    # what save_pretrained would write
    saved = json.loads(config.to_json_string(use_diff=False))
    assert list(moe_layers(read_fields(own, saved))) == layers_of_module(module)
