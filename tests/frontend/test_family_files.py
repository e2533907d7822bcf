"""Family files: the template names everything, users may write their own, mistakes are named."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moec import cli, spec
from moec.errors import BadSpec
from moec.frontend import builtin, family, grammar, layers, load, read_model, sources, values
from moec.frontend.values import read_fields
from tests.frontend import small

FAMILIES = Path(family.__file__).parent / "families"
TEMPLATE = FAMILIES / "_template.toml"

# The family of the small checkpoint, written anew as a user would.
QWEN: dict[str, Any] = {
    "family": "mine",
    "model_types": ["qwen3_moe"],
    "prefixes": ["model."],
    "layer": "layers.{L}.",
    "block": "mlp.",
    "owns": ["mlp."],
    "layouts": ["per_expert"],
    "config": {
        "num_layers": {"key": "num_hidden_layers"},
        "hidden_size": {},
        "intermediate_size": {"key": "moe_intermediate_size"},
        "num_experts": {},
        "top_k": {"key": "num_experts_per_tok"},
        "hidden_act": {"kind": "text"},
        "norm": {"key": "norm_topk_prob", "kind": "flag"},
        "step": {"key": "decoder_sparse_step", "kind": "integer"},
        "dense": {"key": "mlp_only_layers", "kind": "ints", "optional": True},
    },
    "layers": [{"all": [{"not_in": "$dense"}, {"period": "$step", "offset": -1}]}],
    "router": {"score": "softmax", "renorm": {"if": "$norm", "then": "sum", "else": "none"}},
    "activation": {"kind": {"map": "$hidden_act", "to": "activations"}},
    "tensors": {"router": "mlp.gate.weight [E,H]"},
}


def write(path: Path, change: Callable[[dict[str, Any]], Any] = lambda data: None) -> Path:
    data = copy.deepcopy(QWEN)
    change(data)
    path.write_text(json.dumps(data))
    return path


def test_the_template_loads() -> None:
    assert load(TEMPLATE).family == "template"
    assert all(not f.family.startswith("_") for f in builtin())


def test_the_template_names_every_key() -> None:
    text = TEMPLATE.read_text()
    enums = (spec.Score, spec.Precision, spec.Selection, spec.WeightSource, spec.Renorm,
             spec.ScaleOn, spec.ApplyTo, spec.GroupScore, spec.Masked, spec.Nonlinearity,
             spec.Clamp, spec.SharedGate)  # fmt: skip
    tables = (spec.RouterSpec, spec.GroupSpec, spec.ExpertsSpec, spec.ActivationSpec,
              spec.SharedExpertSpec, spec.NormSpec, spec.BlockNorms)  # fmt: skip
    words = {
        *({f.name for f in dataclasses.fields(family.Family)} - {"source"}),
        "own_layouts",
        *family.common().layouts,
        *family.common().maps,
        *family._KINDS,
        *("key", "kind", "default", "optional", "given", "all"),
        *layers._CONDITIONS,
        *layers._ARGUMENTS,
        *values._OPERATORS,
        *sources.SLOTS,
        *(f.name for table in tables for f in dataclasses.fields(table)),
        *(member.value for enum in enums for member in enum),
    }
    missing = sorted(w for w in words if not re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text))
    assert not missing


def test_the_grammar_knows_every_operator() -> None:
    assert set(grammar._OPERATORS) == set(values._OPERATORS)


@pytest.mark.parametrize("name", [f.family for f in builtin()])
def test_defaults_are_of_their_kind(name: str) -> None:
    own = next(f for f in builtin() if f.family == name)
    for key, field in own.config.items():
        if field.default is not None:
            assert values._fits(field.kind, field.default), key


def test_toml_and_json_mean_the_same(tmp_path: Path) -> None:
    toml = tmp_path / "mine.toml"
    toml.write_text(
        """
        family = "mine"
        model_types = ["qwen3_moe"]
        prefixes = ["model."]
        layer = "layers.{L}."
        block = "mlp."
        owns = ["mlp."]
        layouts = ["per_expert"]
        [config]
        num_layers = { key = "num_hidden_layers" }
        hidden_size = {}
        intermediate_size = { key = "moe_intermediate_size" }
        num_experts = {}
        top_k = { key = "num_experts_per_tok" }
        hidden_act = { kind = "text" }
        norm = { key = "norm_topk_prob", kind = "flag" }
        step = { key = "decoder_sparse_step", kind = "integer" }
        dense = { key = "mlp_only_layers", kind = "ints", optional = true }
        [[layers]]
        all = [{ not_in = "$dense" }, { period = "$step", offset = -1 }]
        [router]
        score = "softmax"
        renorm = { if = "$norm", then = "sum", else = "none" }
        [activation]
        kind = { map = "$hidden_act", to = "activations" }
        [tensors]
        router = "mlp.gate.weight [E,H]"
        """
    )
    loaded = [load(toml), load(write(tmp_path / "mine.json"))]
    assert dataclasses.replace(loaded[0], source="") == dataclasses.replace(loaded[1], source="")
    model = read_model(small.write(tmp_path / "model"), toml)
    assert (model.family, len(model.blocks)) == ("mine", 2)
    assert model.blocks[0].spec.router.renorm is spec.Renorm.SUM


def test_a_user_family_replaces_the_builtin_ones(tmp_path: Path) -> None:
    path = small.write(tmp_path / "model", small.config(model_type="brand_new"))
    with pytest.raises(BadSpec, match="'brand_new' is not known") as caught:
        read_model(path)
    assert "the nearest is qwen3_moe" in str(caught.value)
    assert "qwen3_moe.toml" in str(caught.value) and "--family FILE" in str(caught.value)
    mine = write(tmp_path / "f.json", lambda d: d.update(model_types=["brand_new"]))
    assert read_model(path, mine).model_type == "brand_new"
    with pytest.raises(BadSpec, match=r"other.json does not describe the model type") as caught:
        read_model(path, write(tmp_path / "other.json"))
    assert caught.value.need == "qwen3_moe"


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        inner: Any = data
        for key in path[:-1]:
            inner = inner[key]
        if value is KeyError:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value

    return change


LOADING: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unknown key": (put("colour", value=1), "unknown key 'colour'"),
    "no model types": (put("model_types", value=KeyError), "the key 'model_types' is missing"),
    "no tensors": (put("tensors", value=KeyError), "the key 'tensors' is missing"),
    "empty model types": (put("model_types", value=[]), "model_types is not valid"),
    "empty prefixes": (put("prefixes", value=[]), "prefixes is not valid"),
    "empty owns": (put("owns", value=[]), "owns is not valid"),
    "empty layouts": (put("layouts", value=[]), "layouts is not valid"),
    "model types as text": (put("model_types", value="x"), "model_types is no list of strings"),
    "numbers in a list": (put("owns", value=[1]), "owns is no list of strings"),
    "family as number": (put("family", value=3), "family is not valid"),
    "layer as number": (put("layer", value=3), "layer is not valid"),
    "layer without number": (put("layer", value="layers."), "layer is not valid"),
    "block as list": (put("block", value=[]), "block is not valid"),
    "unknown layout": (put("layouts", value=["rowwise"]), "there is no layout 'rowwise'"),
    "layout as text": (put("own_layouts", value={"per_expert": "x"}), "layout per_expert is no"),
    "unknown slot": (put("tensors", "bias", value="b [E]"), "tensors.bias is not valid"),
    "no source": (put("tensors", "router", value=[]), "tensors.router is not valid"),
    "source as number": (put("tensors", "router", value=5), "5 is no tensor source"),
    "source without axes": (put("tensors", "router", value="gate"), "'gate' is no tensor source"),
    "source axis": (put("tensors", "router", value="g [E,Q]"), "'g [E,Q]' is no tensor source"),
    "config as list": (put("config", value=[]), "config is no table"),
    "config entry": (put("config", "hidden_act", value="x"), "config.hidden_act is no table"),
    "config without size": (put("config", "top_k", value=KeyError), "config.top_k is missing"),
    "config key": (put("config", "norm", "type", value=1), "config.norm: unknown key 'type'"),
    "config kind": (put("config", "norm", "kind", value="bool"), "config.norm: unknown kind"),
    "config no kind": (put("config", "norm", "kind", value=KeyError), "unknown kind ''"),
    "layers kind": (put("config", "num_layers", "kind", value="text"), "config.num_layers is not"),
    "config names": (put("config", "norm", "key", value=[1]), "config.norm.key is no list"),
    "require": (put("require", value={"nothing": [1]}), "require.nothing is not valid"),
    "require values": (put("require", value={"norm": True}), "require.norm is not valid"),
    "wrappers": (put("wrappers", value={"x": 1}), "wrappers.x is not valid"),
    "layers as table": (put("layers", value={}), "layers is no list"),
    "layers case": (put("layers", 0, value="all"), "layers[0] is not valid"),
    "layers given": (put("layers", 0, "given", value=["no"]), "layers[0].given is not valid"),
    "layers all": (put("layers", 0, "all", value=["$step"]), "layers[0].all is not valid"),
    "types alone": (put("layers", 0, "all", value=[{"types": "$dense"}]), "all.types is not valid"),
    "reference": (put("router", "score", value="$scores"), "router.score = '$scores' is not"),
    "deep reference": (put("router", "renorm", "then", value="$x"), "router.renorm.then = '$x'"),
    "if": (put("router", "renorm", value={"if": "$norm", "thn": 1}), "router.renorm.if is not"),
    "map": (put("activation", "kind", value={"map": "$norm"}), "activation.kind.map is not"),
    "map table": (put("activation", "kind", "to", value="acts"), "activation.kind.map is not"),
    "map of text": (put("activation", "kind", "map", value="silu"), "activation.kind.map is not"),
    "product": (put("shared", value={"intermediate_size": {"product": 2}}), "size.product is not"),
    "power": (put("router", "scale", value={"power": [1, 2, 3]}), "router.scale.power is not"),
    "first": (put("router", "scale", value={"first": []}), "router.scale.first is not"),
    "router as list": (put("router", value=[]), "router is no table"),
}


@pytest.mark.parametrize("row", LOADING)
def test_mistakes_found_when_loading(tmp_path: Path, row: str) -> None:
    change, message = LOADING[row]
    with pytest.raises(BadSpec) as caught:
        load(write(tmp_path / "mine.json", change))
    assert message in caught.value.message
    assert caught.value.where == "mine.json" and caught.value.need
    assert "_template.toml" in str(caught.value.hint)


READING: dict[str, tuple[Callable[[dict[str, Any]], None], str, str]] = {
    "condition": (put("layers", 0, "all", value=[{"every": 2}]), "unknown layer condition", "mine"),
    "condition type": (
        put("layers", 0, "all", value=[{"start": "$hidden_act"}]),
        "layers: start = 'silu' does not fit the condition 'start'", "mine",
    ),
    "condition null": (
        put("layers", 0, "all", value=[{"in": "$gone"}]),
        "layers: in = None does not fit the condition 'in'", "mine",
    ),
    "period text": (
        put("layers", 0, "all", value=[{"period": 2, "offset": "1"}]),
        "layers: offset = '1' does not fit the condition 'period'", "mine",
    ),
    "product of text": (put("router", "scale", value={"product": ["$hidden_act", 2]}),
                        "are not numbers", "mine"),
    "power": (put("router", "scale", value={"power": [0, -1]}), "is no number", "config"),
    "power overflow": (put("router", "scale", value={"power": [1e300, 9]}), "no number", "config"),
    "router": (put("router", value={"first": ["$hidden_act"]}), "router gives 'silu'", "mine"),
    "shared": (put("shared", value={"first": ["$step"]}), "shared gives 1", "mine"),
    "score": (put("router", "score", value="max"), "spec.router.score: 'max' is unknown", "both"),
    "unknown field": (put("router", "topk", value=3), "spec.router: unknown field", "both"),
    "flag": (put("router", "logit_bias", value="no"), "neither true nor false", "both"),
    "no router": (put("tensors", value={}), "the family names no tensor for router", "mine"),
    "no expert tensor": (
        put("own_layouts", value={"per_expert": {"down": "d [E,H,I]"}}),
        "the family names no tensor for gate_up", "mine",
    ),
    "axes": (put("tensors", "router", value="mlp.gate.weight [E,I]"),
             "mlp.gate.weight [E,I] cannot fill router", "mine"),
    "interleaved": (put("tensors", "router", value="mlp.gate.weight [E,H] interleaved"),
                    "mlp.gate.weight cannot be interleaved", "mine"),
}  # fmt: skip


@pytest.mark.parametrize("row", READING)
def test_mistakes_found_when_reading(tmp_path: Path, row: str) -> None:
    change, message, where = READING[row]

    def both(data: dict[str, Any]) -> None:
        data["config"]["gone"] = {"kind": "ints", "optional": True}
        change(data)

    path = small.write(tmp_path / "model")
    with pytest.raises(BadSpec) as caught:
        read_model(path, write(tmp_path / "mine.json", both))
    assert message in caught.value.message, str(caught.value)
    both_files = "config.json, as mine.json reads it"
    assert caught.value.where == {
        "mine": "mine.json", "config": "config.json", "both": both_files}[where]  # fmt: skip
    assert caught.value.need and caught.value.hint


FILES: dict[str, tuple[str, bytes | None, str]] = {
    "absent": ("f.toml", None, "the family file cannot be read"),
    "not UTF-8": ("f.toml", b"\xff\xfe", "the family file cannot be read"),
    "bad TOML": ("f.toml", b"family = ", "the family file is not well formed"),
    "bad JSON": ("f.json", b"{", "the family file is not well formed"),
    "deep JSON": ("f.json", b"[" * 100_000, "the family file is not well formed"),
    "JSON list": ("f.json", b"[]", "the family file is no table"),
    "empty": ("f.toml", b"", "the key 'family' is missing"),
    "too large": ("f.toml", b"#" * ((1 << 20) + 1), "the family file is too large"),
}


@pytest.mark.parametrize("row", FILES)
def test_files_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: str
) -> None:
    name, data, message = FILES[row]
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    model = small.write(tmp_path / "model")
    assert cli.main(["inspect", str(model), "--family", str(path)]) == 3
    err = capsys.readouterr().err
    assert err.startswith(f"moec: error: {message}") and name in err and "Traceback" not in err


def test_alternative_names_must_agree(tmp_path: Path) -> None:
    own = next(f for f in builtin() if f.family == "qwen3_moe")
    config = small.config(num_local_experts=4)
    assert read_fields(own, config).values["num_experts"] == 4
    with pytest.raises(BadSpec, match="num_experts = 4, num_local_experts = 5 contradict"):
        read_fields(own, small.config(num_local_experts=5))
    with pytest.raises(BadSpec, match="contradict"):
        read_fields(own, small.config(num_local_experts=4.0))
