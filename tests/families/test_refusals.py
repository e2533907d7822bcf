"""Every family refuses what does not fit, and names the tensor or field that is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moec.errors import BadSpec, BadWeights, MoecError
from moec.frontend import Block, Family, builtin, read_model

from . import published, table, tiny

FAMILIES = (*table.FAMILIES, *published.FAMILIES)
VECTORS = ("selection_bias", "router_bias", "gate_up_bias", "output_bias", "shared_router_bias",
           "per_expert_scale", "norm_block_output")  # fmt: skip
# flex_olmo is another name of olmoe.
ROWS = {name: family for family in builtin() for name in (family.family, *family.model_types)}
Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("saved") / "model"
            if family in published.FAMILIES:
                published.write(family, "b", made[family])
            else:
                tiny.tiny(family, "a", made[family])
        return made[family]

    return get


def row(family: str) -> Family:
    return ROWS.get(family) or ROWS[family.replace("_text", "")]


def block(path: Path) -> Block:
    return read_model(path).blocks[-1]


def changed(source: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, target)
    (file,) = target.glob("*.safetensors")
    tensors: dict[str, Any] = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    return target


def configured(source: Path, target: Path, key: str, value: Any) -> Path:
    """A copy of a checkpoint with another value of one config entry (a path of names)."""
    shutil.copytree(source, target)
    file = target / "config.json"
    config = json.loads(file.read_text())
    *outer, name = key.split(".")
    place = config
    for part in outer:
        place = place[part]
    place[name] = value
    file.write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_expert(saved: Saved, tmp_path: Path, family: str) -> None:
    source = saved(family)
    plan = block(source).plan["down"]
    name = plan.pieces[-1].name(plan.experts - 1)
    path = changed(source, tmp_path / "m", lambda tensors: tensors.pop(name))
    with pytest.raises(BadWeights, match="is missing") as caught:
        read_model(path)
    assert name in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_shape(saved: Saved, tmp_path: Path, family: str) -> None:
    source = saved(family)
    name = block(source).plan["router"].pieces[0].tensor
    path = changed(source, tmp_path / "m", lambda t: t.update({name: t[name][:-1].copy()}))
    with pytest.raises(BadWeights, match="has the shape") as caught:
        read_model(path)
    assert name in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_vector(saved: Saved, tmp_path: Path, family: str) -> None:
    """A bias or scale that the family has; for a family without any, one more than it has."""
    source = saved(family)
    own = dict(block(source).plan.params)
    vector = next((v for v in VECTORS if v in own), None)
    names = []
    if vector is not None:
        name = own[vector].pieces[0].tensor
        path = changed(source, tmp_path / "m", lambda tensors: tensors.pop(name))
        # A family may know several names for it: the error asks for the published one.
        other = row(family).tensors.get(vector, [])
        names = [text.split(" ")[0] for text in (other if isinstance(other, list) else [])]
    else:
        name = own["router"].pieces[0].tensor.replace(".weight", ".bias")
        size = own["router"].shape[0]
        path = changed(source, tmp_path / "m", lambda t: t.update({name: np.ones(size, "f4")}))
    with pytest.raises(BadWeights, match=r"is missing|not used by anything") as caught:
        read_model(path)
    assert any(n in str(caught.value) for n in (name, *names[:1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_scoring_function(saved: Saved, tmp_path: Path, family: str) -> None:
    fields = row(family).config
    field = fields.get("scoring_func") or fields.get("selection")
    key = field.keys[0] if field else "scoring_func"
    path = configured(saved(family), tmp_path / "m", key, "tanh")
    with pytest.raises(BadSpec) as caught:
        read_model(path)
    assert key in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_experts_a_token_than_experts(saved: Saved, tmp_path: Path, family: str) -> None:
    source = saved(family)
    config = json.loads((source / "config.json").read_text())
    keys = row(family).config["top_k"].keys
    key = next(k for k in keys if k in config or "." in k)
    path = configured(source, tmp_path / "m", key, 60)
    with pytest.raises(MoecError) as caught:
        read_model(path)
    assert key in str(caught.value) or "top_k" in str(caught.value)


@pytest.mark.parametrize(
    "model_type",
    ["switch_transformers", "nllb-moe", "doge", "zaya", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text"],
)
def test_refused_by_name(saved: Saved, tmp_path: Path, model_type: str) -> None:
    path = configured(saved("mixtral"), tmp_path / "m", "model_type", model_type)
    with pytest.raises(BadSpec, match=f"{model_type}' is not supported: "):
        read_model(path)


def test_a_field_that_no_row_reads_is_an_error(saved: Saved, tmp_path: Path) -> None:
    path = configured(saved("dbrx"), tmp_path / "m", "ffn_config.moe_group_size", 4)
    with pytest.raises(BadSpec, match=r"ffn_config\.moe_group_size: not understood"):
        read_model(path)
