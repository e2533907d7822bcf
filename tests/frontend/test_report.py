"""What `moec inspect` says of a checkpoint: right numbers, every problem, headers only."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from moec import cli
from moec.checkpoint import Checkpoint
from moec.frontend import formula, read_model, report, survey
from moec.spec import (
    ActivationSpec,
    ApplyTo,
    Clamp,
    GroupScore,
    GroupSpec,
    Masked,
    Nonlinearity,
    Renorm,
    RouterSpec,
    ScaleOn,
    Score,
    Selection,
    WeightSource,
)
from tests.conftest import Saved
from tests.frontend import small
from tests.models import FAMILIES, VARIANTS, moe_layers

Capture = pytest.CaptureFixture[str]

ROUTERS = {
    ("mixtral", "a"): "softmax over 8 -> top 2 -> / sum",
    ("qwen2_moe", "a"): "softmax over 8 -> top 4",
    ("qwen2_moe", "b"): "softmax over 6 -> top 2 -> / sum",
    ("qwen3_moe", "a"): "softmax over 16 -> top 4 -> / sum",
    ("olmoe", "b"): "softmax over 6 -> top 4 -> / sum",
    ("deepseek_v3", "a"): "sigmoid over 16 -> + selection bias -> top 2 of 4 groups (by sum of "
    "top 2) -> top 4 -> score without bias -> / (sum + 1e-20) -> * 2.5",
    ("deepseek_v3", "b"): "sigmoid over 6 -> + selection bias -> top 2 of 3 groups (by sum of "
    "top 2) -> top 3 -> score without bias -> * 1.3",
    ("gpt_oss", "a"): "logits + bias over 8 -> top 4 -> softmax of the 4",
    ("llama4_text", "a"): "logits over 4 -> top 1 -> sigmoid -> weight the expert's input",
    ("llama4_text", "b"): "logits over 6 -> top 2 -> sigmoid of each -> weight the expert's input",
    ("gemma4_text", "a"): "softmax over 8 -> top 2 -> / sum -> * scale of the expert",
    ("phimoe", "b"): "logits over 6 -> sparsemixer top 2 (eps 0.2)",
}


def counts(model: Any) -> tuple[int, int]:
    """(elements of all MoE blocks, those that one token uses), from the modules themselves."""
    config = model.config
    top_k = getattr(config, "top_k_experts", None) or config.num_experts_per_tok
    total = active = 0
    for layer in moe_layers(model):
        decoder = model.model.layers[layer]
        named = [*decoder.named_parameters(), *decoder.named_buffers()]
        for name, tensor in named:
            if "attn" in name or name.startswith(_OUTSIDE):
                continue
            total += tensor.numel()
            if ".experts." in f".{name}":
                active += tensor.numel() // tensor.shape[0] * top_k
            else:
                active += tensor.numel()
    return total, active


_OUTSIDE = ("input_layernorm.", "post_attention_layernorm.", "layer_scalar")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(saved: Saved, family: str, variant: str) -> None:
    module, path = saved(family, variant, "bfloat16")
    model = read_model(path)
    facts = json.loads(json.dumps(report.describe(model)))
    total, active = counts(module)
    assert (facts["elements"], facts["active_elements"]) == (total, active)
    assert facts["layers"]["moe"] == moe_layers(module)
    assert facts["layers"]["count"] == module.config.num_hidden_layers
    assert sorted(facts["layers"]["moe"] + facts["layers"]["dense"]) == [
        *range(facts["layers"]["count"])
    ]
    assert facts["problems"] == [] and list(facts["shapes"]) == ["b0"]
    expected = ROUTERS.get((family, variant))
    assert expected is None or facts["shapes"]["b0"]["router"] == expected
    text = report.text(model)
    assert all(len(line) <= 100 for line in text.splitlines()[1:])
    assert text.isascii() and str(path) in text.splitlines()[0]


def test_two_shapes_and_two_layouts(tmp_path: Path) -> None:
    arrays = small.tensors()
    arrays[small.ROUTER.format(layer=1)] = arrays[small.ROUTER.format(layer=1)].astype("f2")
    model = read_model(small.write(tmp_path, None, arrays))
    facts = report.describe(model)
    assert [entry["layers"] for entry in facts["shapes"].values()] == [[0], [1]]
    assert facts["shapes"]["b1"]["parameters"]["router"]["dtype"] == "float16"
    assert "compiles to 2 block shapes" in report.text(model)
    blocks = (model.blocks[0], dataclasses.replace(model.blocks[0], layer=1, layout="other"))
    text = report.text(dataclasses.replace(model, blocks=blocks))
    assert "per_expert (layers 0): " in text and "other (layers 1): " in text


def test_sizes_of_a_real_model_from_headers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    # Qwen3-30B-A3B's sizes in a sparse file of 58 GB; its card: 128 experts, 8 active.
    e, h, i, layers = 128, 2048, 768, 48
    shapes = {}
    for n in range(layers):
        block = f"model.layers.{n}.mlp."
        shapes[block + "gate.weight"] = (e, h)
        shapes[block + "experts.gate_up_proj"] = (e, 2 * i, h)
        shapes[block + "experts.down_proj"] = (e, h, i)
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * shape[1] * (shape[2] if len(shape) > 2 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    fields = small.config("bfloat16", num_hidden_layers=layers, hidden_size=h, num_experts=e,
                          moe_intermediate_size=i, num_experts_per_tok=8)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("tensor data was read"))
    assert cli.main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "58.0 GB, 29.0 billion parameters, 1.8 billion active per token" in out
    assert "layers      48: 48 MoE (0-47), 0 dense" in out
    assert "router      softmax over 128 -> top 8 -> / sum" in out
    assert "E=128 K=8 H=2048 I=768, 1.2 GB a layer" in out
    assert "gate_up  [128, 1536, 2048]  bfloat16  805.3 MB" in out


def test_all_problems_are_printed_after_the_description(tmp_path: Path, capsys: Capture) -> None:
    arrays = small.tensors()
    gone = [small.expert(layer, e, "up") for layer in (0, 1) for e in range(4)]
    for name in gone:
        del arrays[name]
    path = small.write(tmp_path, None, arrays)
    assert len(survey(path).problems) == 8
    assert cli.main(["inspect", str(path)]) == 3
    out, err = capsys.readouterr()
    assert out.startswith("checkpoint  ") and "softmax over 4 -> top 2 -> / sum" in out
    assert "\n8 problems with the weights:\n" in out
    assert all(f"{name!r} is missing (need [6, 8] float32)" in out for name in gone)
    assert err.splitlines()[0] == (
        "moec: error: the weights have 8 problems; they are listed above"
    )
    assert [line[:7] for line in err.splitlines()[1:]] == ["  in   ", "  need ", "  try  "]
    assert cli.main(["inspect", str(path), "--json"]) == 3
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["problems"]) == 8 and facts["elements"] == 2 * (32 + 4 * 3 * 48)


def test_one_problem(tmp_path: Path, capsys: Capture) -> None:
    arrays = {**small.tensors(), "model.layers.1.mlp.extra": small.tensors()["model.norm.weight"]}
    assert cli.main(["inspect", str(small.write(tmp_path, None, arrays))]) == 3
    out, err = capsys.readouterr()
    assert "\n1 problem with the weights:\n  - tensor 'model.layers.1.mlp.extra' [8]" in out
    assert "the weights have 1 problem;" in err


ROUTER = RouterSpec(8, 2)
FORMULAS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "softmax over 8 -> top 2"),
    "sqrt_softplus": ({"score": Score.SQRT_SOFTPLUS}, "sqrt(softplus) over 8 -> top 2"),
    "scaled logits": ({"logit_scale": 0.5}, "softmax of 0.5 * (logits) over 8 -> top 2"),
    "capped logits": (
        {"logit_cap": 30.0, "logit_bias": True},
        "softmax of 30 * tanh((logits + bias) / 30) over 8 -> top 2",
    ),
    "clamped sum": (
        {"renorm": Renorm.CLAMPED_SUM, "renorm_epsilon": 1e-12},
        "softmax over 8 -> top 2 -> / max(sum, 1e-12)",
    ),
    "p-norm": (
        {"renorm": Renorm.P_NORM, "renorm_p": 2.0},
        "softmax over 8 -> top 2 -> / 2-norm",
    ),
    "groups": (
        {"groups": GroupSpec(4, 1, GroupScore.MAX, Masked.ZERO)},
        "softmax over 8 -> top 1 of 4 groups (by max, the others 0) -> top 2",
    ),
    "groups without bias": (
        {"groups": GroupSpec(4, 1, biased=False), "selection_bias": True},
        "softmax over 8 -> + selection bias -> top 1 of 4 groups (by sum of top 2 without bias)"
        " -> top 2 -> score without bias",
    ),
    "routed sum": (
        {"scale": 16.0, "scale_on": ScaleOn.ROUTED_SUM},
        "softmax over 8 -> top 2 -> sum of the experts * 16",
    ),
    "input": (
        {"apply_to": ApplyTo.INPUT, "scale": 3.0},
        "softmax over 8 -> top 2 -> * 3 -> weight the expert's input",
    ),
    "sparsemixer": (
        {"score": Score.NONE, "selection": Selection.SPARSEMIXER,
         "weight_source": WeightSource.SPARSEMIXER, "sparsemixer_eps": 0.01},
        "logits over 8 -> sparsemixer top 2 (eps 0.01)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", FORMULAS)
def test_router_formula(row: str) -> None:
    changes, expected = FORMULAS[row]
    assert formula.router(dataclasses.replace(ROUTER, **changes)) == expected


def test_no_two_routers_read_alike() -> None:
    made = [formula.router(dataclasses.replace(ROUTER, **c)) for c, _ in FORMULAS.values()]
    assert len(set(made)) == len(made)


# Roundings, and numbers that only say something together with a choice made in FORMULAS.
UNTOLD = {"num_experts", "top_k", "logits_dtype", "weights_dtype", "renorm_epsilon", "renorm_p",
          "sparsemixer_eps", "score", "selection", "weight_source"}  # fmt: skip
TOLD: dict[str, Any] = {
    "logit_bias": True, "logit_scale": 2.0, "logit_cap": 3.0, "selection_bias": True,
    "groups": GroupSpec(2, 1), "renorm": Renorm.SUM, "scale": 2.0, "per_expert_scale": True,
    "apply_to": ApplyTo.INPUT,
}  # fmt: skip


def test_every_field_of_a_router_is_told() -> None:
    """A field that is added to RouterSpec must show in the line, or be listed as untold."""
    names = {f.name for f in dataclasses.fields(RouterSpec)}
    assert names == UNTOLD | set(TOLD) | {"scale_on"}
    plain = formula.router(ROUTER)
    for name, value in TOLD.items():
        assert formula.router(dataclasses.replace(ROUTER, **{name: value})) != plain
    scaled = dataclasses.replace(ROUTER, scale=2.0)
    on_sum = dataclasses.replace(scaled, scale_on=ScaleOn.ROUTED_SUM)
    assert formula.router(on_sum) != formula.router(scaled)


def test_every_field_of_an_activation_is_told() -> None:
    changes: dict[str, dict[str, Any]] = {
        "kind": {"kind": Nonlinearity.RELU},
        "alpha": {"alpha": 2.0},
        "clamp": {"clamp": Clamp.AFTER, "limit": 3.0},
        "limit": {"clamp": Clamp.BEFORE, "limit": 3.0},
        "up_offset": {"up_offset": 1.0},
    }
    assert set(changes) == {f.name for f in dataclasses.fields(ActivationSpec)}
    told = {
        formula.activation(dataclasses.replace(ActivationSpec(), **c)) for c in changes.values()
    }
    assert len(told) == len(changes) and formula.activation(ActivationSpec()) not in told


@pytest.mark.parametrize(
    ("spec", "gated", "expected"),
    [
        (ActivationSpec(), True, "silu(gate) * up"),
        (ActivationSpec(Nonlinearity.RELU2), False, "relu2(up)"),
        (ActivationSpec(clamp=Clamp.AFTER, limit=10.0), True, "min(silu(gate), 10) * clip(up, 10)"),
        (ActivationSpec(clamp=Clamp.BEFORE, limit=10.0), True,
         "silu(min(gate, 10)) * clip(up, 10)"),
        (ActivationSpec(alpha=1.702, up_offset=1.0), True, "swish(gate, slope 1.702) * (up + 1)"),
    ],
)  # fmt: skip
def test_activation_formula(spec: ActivationSpec, gated: bool, expected: str) -> None:
    assert formula.activation(spec, gated) == expected
