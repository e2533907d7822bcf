"""`moec compile` and what follows it: report, several targets, and `moec run` on the artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec import cli, host
from tests import tiny

Capture = pytest.CaptureFixture[str]
Made = tuple[Path, dict[str, Any]]


def call(capsys: Capture, *argv: str | Path) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The folder of a tiny checkpoint, and its tensors."""
    folder = tmp_path_factory.mktemp("made") / "tiny"
    return folder, tiny.write(folder)


@pytest.fixture(scope="module")
def artifact(made: Made) -> Path:
    """The checkpoint compiled as `moec compile` does it by default."""
    out = made[0].with_suffix(".moec")
    assert cli.main(["compile", str(made[0]), "-o", str(out), "-q"]) == 0
    return out


def test_defaults(capsys: Capture, artifact: Path) -> None:
    facts = json.loads(call(capsys, "inspect", artifact, "--json")[1])
    (name, target), *others = facts["targets"].items()
    assert not others and target["runs_here"]
    assert facts["weights"] == {"mode": "pack", "target": name}
    spans = {v["schedule"]: v["tokens"] for v in target["functions"]["b0"]["moe"]}
    assert spans == {"fused": [2, None], "gather": [0, 2]}  # every T has one


def test_run_against_numpy(capsys: Capture, made: Made, artifact: Path, tmp_path: Path) -> None:
    x, y = tmp_path / "x.npy", tmp_path / "y.npy"
    for tokens in (0, 1, 9):
        np.save(x, tiny.inputs(tokens))
        np.save(y, tiny.moe(made[1], 1, np.load(x)))
        base = ("run", artifact, "--layer", "1", "--input", x, "--expect", y)
        # float32 sums of 24 products and a float32 softmax: some 1e-7 of values near 1.
        code, out, _ = call(capsys, *base, "--rtol", "1e-5", "--atol", "1e-6")
        assert code == 0 and "as expected" in out
    np.save(y, np.load(y) * 1.001)
    code, out, err = call(capsys, *base)
    assert code == 5 and "NOT as expected" in out and "y differs" in err
    assert call(capsys, *base, "--rtol", "0.01")[0] == 0


def test_several_targets(capsys: Capture, made: Made, tmp_path: Path) -> None:
    if host.host().arch != "x86_64":
        pytest.skip("needs two targets that run here, and only x86-64 has them")
    first, second, out = "cpu:x86-64", "cpu", tmp_path / "two.moec"
    argv = ("compile", made[0], "-t", first, "--target", second, "-t", first, "-o", out)
    code, text, _ = call(capsys, *argv, "--layers", "0", "--schedule", "loop")
    assert code == 0 and "target   cpu-x86-64: b0 by loop (any T)" in text
    facts = json.loads(call(capsys, "inspect", out, "--json")[1])
    assert len(facts["targets"]) == 2 and all(t["runs_here"] for t in facts["targets"].values())
    # Packed for the first, so that is the one that runs.
    assert facts["weights"] == {"mode": "pack", "target": "cpu-x86-64"}
    np.save(tmp_path / "x.npy", tiny.inputs(3))
    np.save(tmp_path / "y.npy", tiny.moe(made[1], 0, tiny.inputs(3)))
    files = ("--input", tmp_path / "x.npy", "--expect", tmp_path / "y.npy")
    code, text, _ = call(capsys, "run", out, "--layer", "0", *files)
    assert code == 0 and "on cpu-x86-64," in text


def test_dry_run_writes_nothing(capsys: Capture, made: Made, tmp_path: Path) -> None:
    out = tmp_path / "never.moec"
    code, text, err = call(capsys, "compile", made[0], "-o", out, "--dry-run")
    assert (code, err) == (0, "") and not out.exists()
    assert f"would be {out}" in text and "fused (T >= 2), gather (T < 2)" in text
    facts = json.loads(call(capsys, "compile", made[0], "-o", out, "--dry-run", "--json")[1])
    assert facts["digest"] is None and facts["layers"] == [0, 1]
    assert [*facts["targets"].values()] == [{"b0": {"fused": "T >= 2", "gather": "T < 2"}}]


def test_a_pass_that_never_ran_writes_nothing(capsys: Capture, made: Made, tmp_path: Path) -> None:
    out = tmp_path / "never.moec"
    argv = ("compile", made[0], "-o", out, "--schedule", "loop", "--print-ir-after", "moec.Fold")
    code, text, err = call(capsys, *argv)
    assert (code, text) == (2, "") and "moec.FoldReduce" in err and not out.exists()
    assert list(tmp_path.iterdir()) == []


def test_looking_inside(capsys: Capture, made: Made, tmp_path: Path) -> None:
    stop = ("compile", made[0], "--stop-after")
    code, out, _ = call(capsys, *stop, "graph")
    assert code == 0 and "R.moec.gather_rows" in out
    code, out, _ = call(capsys, *stop, "passes", "--schedule", "fused")
    assert code == 0 and "R.moec.gather_rows" not in out and "R.moec.grouped_matmul" in out
    dump = tmp_path / "ir"
    extra = ("--dump-ir", dump, "--time-passes", "--json", "--schedule", "loop")
    code, out, _ = call(capsys, *stop, "legalized", *extra)
    names = sorted(path.name for path in dump.iterdir())
    assert code == 0 and names[0] == "000-b0-graph.py" and "LegalizeOps" in names[-1]
    assert "moec.LoopExperts" in json.loads(out)["pass_seconds"]
    shown = ("--print-ir-after", "moec.FoldGather", "--schedule", "fused")
    code, out, _ = call(capsys, *stop, "legalized", *shown)
    assert code == 0 and "# b0-fused after moec.FoldGather" in out
