"""moec quickstart on a tiny checkpoint, and the checkpoint that it makes, read by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors import safe_open

import moec
from moec import cli, host
from moec.quickstart import machine, made, runs
from moec.quickstart.runs import TOKENS, Row
from moec.quickstart.table import text
from tests import models
from tests.blocks import error
from tests.conftest import SCHEDULES, Saved

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *argv: str) -> tuple[int, str, str]:
    code = cli.main(["quickstart", *argv])
    return code, *capsys.readouterr()


def test_a_checkpoint_of_the_user(
    saved: Saved, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_SECONDS", 0.02)
    _, path = saved("qwen3_moe", "a", "bfloat16")
    code, out, err = run(capsys, "--checkpoint", str(path), "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["family"] == "qwen3_moe" and len(facts["digest"]) == 64
    assert facts["layer"] == 1 and facts["threads"] == host.threads()
    assert facts["read_bytes_per_second"] > 1e8 and facts["flops_per_second"] > 1e8
    rows = [Row(**row) for row in facts["rows"]]
    assert [(r.tokens, r.schedule) for r in rows] == [(t, s) for t in TOKENS for s in SCHEDULES]
    assert facts["spec"]["experts"]["num_experts"] == 16
    for row in rows:
        assert row.ok and 0 <= row.error <= row.allowed and row.seconds > 0
        # Every pair multiplies 3 * H * I weights; each weight is two bytes.
        assert row.flops == 2 * row.tokens * 4 * 3 * 64 * 32
        assert row.bytes <= 16 * 3 * 64 * 32 * 2
    table = text(rows, facts)
    lines = table.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "qwen3_moe: E=16 K=4 H=64 I=32 bfloat16" in lines[0]
    assert sum(line.endswith(" ok") and line.split()[0] in SCHEDULES for line in lines) == len(rows)
    assert f"{len(rows)} of {len(rows)} results right." in table


@pytest.mark.parametrize("command", [["quickstart"], ["selftest", "-t", "cpu"]])
def test_a_wrong_number_of_threads_is_refused_before_the_work(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "many")
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert "TVM_NUM_THREADS is 'many'" in err and "checkpoint" not in out + err


def test_a_wrong_result_is_said_and_fails(
    saved: Saved, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_SECONDS", 0.0)
    monkeypatch.setattr(runs, "TOKENS", (1,))
    monkeypatch.setattr(machine, "measure", lambda dtype: machine.Machine(1e10, 1e11, 2))
    monkeypatch.setitem(runs._ALLOWED, "bfloat16", 0.0)
    _, path = saved("qwen3_moe", "a", "bfloat16")
    code, out, err = run(capsys, "--checkpoint", str(path))
    assert code == 5 and out.count("WRONG") == 3 and "0 of 3 results right." in out
    assert "3 of 3 results differ from the float64 reference" in err


def test_a_checkpoint_that_is_none(capsys: Capture, tmp_path: Path) -> None:
    code, out, err = run(capsys, "--checkpoint", str(tmp_path))
    assert code == 3 and out == "" and str(tmp_path) in err


SMALL = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
         "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 97, "head_dim": 16,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def test_transformers_reads_what_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own from_pretrained finds every tensor, and its module computes what moec does."""
    assert transformers.AutoConfig.for_model(**made.CONFIG).num_experts == 64
    for key, value in SMALL.items():
        monkeypatch.setitem(made.CONFIG, key, value)
    folder, out = tmp_path / "made", tmp_path / "made.moec"
    folder.mkdir()
    size = made.write(folder)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) == 2 and 0 < sum(s.stat().st_size for s in shards) - size < 20_000
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size
    for shard in shards:
        with safe_open(shard, "np") as file:
            assert {n for n, s in index["weight_map"].items() if s == shard.name} == set(
                file.keys()
            )

    config = transformers.AutoConfig.from_pretrained(folder)
    assert isinstance(config, transformers.Qwen3MoeConfig)
    assert {key: getattr(config, key) for key in SMALL} == SMALL
    assert config.norm_topk_prob and config.mlp_only_layers == [0]
    model, info = transformers.Qwen3MoeForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not [name for name in info["missing_keys"] if "layers.1.mlp" in name]

    moec.compile(folder, out=out, schedules=["gather"])
    x = np.random.default_rng(0).standard_normal((9, 64)).astype(ml_dtypes.bfloat16)
    exact = models.reference_moe(models.widened(model), made.LAYER, x)
    theirs = models.reference_moe(model, made.LAYER, x)
    # As for the families: their error in bfloat16, and 2^-8 for the roundings of ours.
    assert error(moec.load(out)[made.LAYER](x), exact) <= error(theirs, exact) + 2.0**-8
