"""Configs: which family they belong to, and every field that is absent, odd or contradictory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moec.errors import BadSpec, MoecError
from moec.frontend import builtin, family, read_model
from moec.frontend.lookup import looks_like_moe, nearest
from tests.conftest import Saved
from tests.frontend import small


def refused(path: Path, fields: dict[str, Any], arrays: Any = None) -> BadSpec:
    with pytest.raises(BadSpec) as caught:
        read_model(small.write(path, fields, arrays))
    error = caught.value
    assert error.where and error.where.startswith("config.json") and error.need and error.hint
    assert error.exit_code == 3
    return error


E, K, H, I, L = (
    "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size",
    "num_hidden_layers",
)  # fmt: skip
SIZE = "a positive integer"
NONSENSE = {"null": None, "negative": -1, "zero": 0, "true": True, "float": 4.0, "text": "4",
            "list": [4], "NaN": float("nan"), "huge": 1 << 60}  # fmt: skip


@pytest.mark.parametrize("kind", ["missing", *NONSENSE])
@pytest.mark.parametrize("field", [E, K, H, I, L])
def test_sizes(tmp_path: Path, field: str, kind: str) -> None:
    error = refused(tmp_path, small.config(**{field: NONSENSE.get(kind, KeyError)}))
    assert field in error.message and error.need == SIZE
    assert {"missing": "is missing", "null": "is null"}.get(kind, "is not valid") in error.message


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "K over E": ({K: 5}, "5 experts per token cannot be chosen of 4"),
    "K over 64": ({E: 4, K: 65}, "router.top_k: 65 is outside [1, 64]"),
    "E over 65536": ({E: 65537, L: 1}, "router.num_experts: 65537 is outside [1, 65536]"),
    "H huge": ({H: (1 << 20) + 1}, "experts.hidden_size: 1048577 is outside"),
    "product": ({E: 65536, H: 8192, I: 2048, L: 1}, "E * I * H overflows 2^40 elements"),
    "activation": ({"hidden_act": "snake"}, "hidden_act: 'snake' is not known"),
    "activation type": ({"hidden_act": 3}, "hidden_act: 3 is not valid"),
    "flag as number": ({"norm_topk_prob": 1}, "norm_topk_prob: 1 is not valid"),
    "flag as text": ({"norm_topk_prob": "true"}, "norm_topk_prob: 'true' is not valid"),
    "two names": ({"num_local_experts": 8}, "num_experts = 4, num_local_experts = 8 contradict"),
    "dtype": ({"dtype": "int8"}, "dtype: 'int8' is not supported"),
    "dtype type": ({"dtype": 16}, "dtype: 16 is not supported"),
    "old dtype": ({"dtype": KeyError, "torch_dtype": "float8_e4m3fn"}, "'float8_e4m3fn' is not"),
    "no model type": ({"model_type": KeyError}, "model_type is missing"),
    "null model type": ({"model_type": None}, "model_type is missing"),
    "list of types": ({"model_type": ["qwen3_moe"]}, "model_type is missing"),
    "long text": ({"hidden_act": "x" * 5000}, f"'{'x' * 56}... is not known"),
}


@pytest.mark.parametrize("row", ROWS)
def test_contradictions(tmp_path: Path, row: str) -> None:
    changes, message = ROWS[row]
    error = refused(tmp_path, small.config(**changes))
    assert message in error.message
    if "cannot be chosen" in message:
        assert error.hint == (
            "the config says num_experts / num_local_experts = 4, num_experts_per_tok = 5, "
            "hidden_size = 8, moe_intermediate_size = 6"
        )


GROUPS: dict[str, tuple[dict[str, Any], str]] = {
    "n_group": ({"n_group": 3}, "3 groups do not divide 16 experts"),
    "topk_group": ({"topk_group": 5}, "5 groups cannot be kept of 4 (topk_group > n_group)"),
    "too few": ({"topk_group": 1, "n_group": 16, "num_experts_per_tok": 4}, "hold fewer than"),
    "single": ({"n_group": 16, "topk_group": 8}, "sum_top2 needs two experts a group"),
    "float": ({"n_group": 4.0}, "n_group: 4.0 is not valid"),
    "null": ({"topk_group": None}, "router.groups.kept: None is not an integer"),
    "scoring": ({"scoring_func": "softmax"}, "scoring_func: 'softmax' is not known for the family"),
    "method": ({"topk_method": "greedy"}, "topk_method: 'greedy' is not known for the family"),
    "scale": ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor: inf is not valid"),
    "scale type": ({"routed_scaling_factor": "2.5"}, "routed_scaling_factor: '2.5' is not valid"),
    "first dense": ({"first_k_dense_replace": -1}, "first_k_dense_replace: -1 is not valid"),
}


@pytest.mark.parametrize("row", GROUPS)
def test_deepseek_fields(saved: Saved, tmp_path: Path, row: str) -> None:
    changes, message = GROUPS[row]
    _, path = saved("deepseek_v3", "a", "float32")
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    (tmp_path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    with pytest.raises(BadSpec) as caught:
        read_model(tmp_path)
    assert message in caught.value.message and "config.json" in str(caught.value.where)


def test_no_groups_at_all(saved: Saved, tmp_path: Path) -> None:
    _, path = saved("deepseek_v3", "a", "float32")
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    for changes in ({"n_group": None, "topk_group": None}, {"n_group": 1, "topk_group": 1}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        groups = read_model(tmp_path).blocks[0].spec.router.groups
        assert groups is None or (groups.count, groups.kept) == (1, 1)
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_shared_experts": 0}))
    with pytest.raises(MoecError, match=r"shared_experts\.down_proj\.weight' .* is not used"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    "field",
    ["num_zero_experts", "moe_latent_size", "routed_scaling_factor", "router_logit_softcap",
     "n_group", "expert_swiglu_limit", "moe_layer_freq"],
)  # fmt: skip
def test_a_field_that_sounds_like_moe_is_an_error(tmp_path: Path, field: str) -> None:
    error = refused(tmp_path, small.config(**{field: 2}))
    assert error.message == f"{field}: not understood for the family qwen3_moe"
    assert error.need == "fields that qwen3_moe.toml reads or ignores"
    assert "`ignore`" in error.hint and "--family FILE" in error.hint
    # null is how configs say that a feature is off
    assert read_model(small.write(tmp_path, small.config(**{field: None}))).blocks


def test_training_fields_are_ignored(tmp_path: Path) -> None:
    extra = {name: 0.5 for name in family.common().ignore}
    assert any(map(looks_like_moe, extra))
    assert read_model(small.write(tmp_path, small.config(**extra))).blocks


REFUSED = ["switch_transformers", "nllb-moe", "doge", "zaya", "ernie4_5_vl_moe"]


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_refused_by_name(tmp_path: Path, model_type: str) -> None:
    error = refused(tmp_path, small.config(model_type=model_type))
    reason = family.common().refused[model_type]
    assert error.message == f"the model type {model_type!r} is not supported: {reason}"


QUANTIZED: dict[str, tuple[str, Any, str]] = {
    "fp8": ("quantization_config", {"quant_method": "fp8"}, "'fp8' weights are not supported"),
    "mxfp4": ("quantization_config", {"quant_method": "mxfp4"}, "'mxfp4' weights are not"),
    "unknown": ("quantization_config", {"bits": 4}, "None weights are not supported"),
    "text": ("quantization_config", "awq", "'awq' weights are not supported"),
    "compressed": ("compression_config", {"quant_method": "compressed-tensors"}, "'compressed-t"),
}


@pytest.mark.parametrize("row", QUANTIZED)
def test_quantized_checkpoints(tmp_path: Path, row: str) -> None:
    key, value, message = QUANTIZED[row]
    error = refused(tmp_path / "flat", small.config(**{key: value}))
    assert error.message.startswith(f"{key}: ") and message in error.message
    nested = {"model_type": "some_vl", "text_config": small.config(), key: value}
    assert message in refused(tmp_path / "nested", nested).message


def test_unknown_model_types(tmp_path: Path) -> None:
    odd = small.config(model_type="grok9", moe_top_k="\x1b[31m", router_p_norm=2)
    error = refused(tmp_path, odd)
    assert error.message == "the model type 'grok9' is not known"
    assert "the nearest is " in error.need and "like grok_1.toml" in error.hint
    assert "moe_top_k = '\\x1b[31m'" in error.hint and "router_p_norm = 2" in error.hint
    assert "model.layers.N.mlp.experts.N.down_proj.weight" in error.hint
    assert "\x1b" not in str(error)


def test_keys_are_escaped_in_messages(tmp_path: Path) -> None:
    for model_type in ("qwen3_moe", "grok9"):
        error = refused(tmp_path, small.config(model_type=model_type, **{"moe\x1b[2J": 1}))
        assert "\x1b" not in str(error) and r"'moe\x1b[2J'" in str(error)


def test_dense_models(tmp_path: Path) -> None:
    dense = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2}
    error = refused(tmp_path, dense)
    assert "no field of the config is about experts" in error.message
    assert "mixtral" in error.hint


def test_the_nearest_family() -> None:
    keys = {"n_routed_experts", "n_group", "topk_group", "routed_scaling_factor"}
    assert nearest("deepseek_v9", keys, builtin()).family == "deepseek_v3"
    assert nearest("mixtral2", {"num_local_experts"}, builtin()).family == "mixtral"


def test_nested_configs_that_are_not_ours(tmp_path: Path) -> None:
    """Other nested configs neither decide nor disturb."""
    nested = {
        "model_type": "some_vl",
        "vision_config": {"model_type": "siglip", "moe_experts": 3},
        "audio_config": None,
        "text_config": small.config(),
    }
    model = read_model(small.write(tmp_path, nested))
    assert (model.family, model.model_type, len(model.blocks)) == ("qwen3_moe", "some_vl", 2)


def test_dtype_comes_from_the_nested_then_the_outer_config_then_the_file(tmp_path: Path) -> None:
    inner = small.config(dtype=KeyError)
    arrays = small.tensors("bfloat16")
    for number, fields in enumerate((
        {"dtype": "bfloat16", "model_type": "vl", "text_config": inner},
        {"dtype": "float32", "model_type": "vl", "text_config": {**inner, "dtype": "bfloat16"}},
        {"model_type": "vl", "text_config": {**inner, "torch_dtype": "torch.bfloat16"}},
        inner,
    )):  # fmt: skip
        path = small.write(tmp_path / str(number), fields, arrays)
        assert read_model(path).dtype == "bfloat16"
