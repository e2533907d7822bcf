"""Damaged, hostile and contradictory checkpoints: one case for every kind of bad input.

Each case is built in code, must be refused by `moec inspect` with exit code 3 and no
traceback, and the error must name the file, the tensor or field, what was needed and what to
try.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moec import cli
from moec.checkpoint import header
from moec.errors import BadCheckpoint, BadSpec, BadWeights, MoecError
from moec.frontend import read_model, survey
from tests.bad_inputs.file_rows import FILE, FORMAT, INDEXED
from tests.bad_inputs.model_rows import CONFIG, CONFIG_FILE, WEIGHTS, arrays
from tests.bad_inputs.rows import SINGLE, UP, Row
from tests.frontend import small

Capture = pytest.CaptureFixture[str]

TABLES: dict[str, tuple[type[MoecError], dict[str, Row], int]] = {
    "file": (BadCheckpoint, FILE, 0),
    "index": (BadCheckpoint, INDEXED, 3),
    "format": (BadCheckpoint, FORMAT, 0),
    "config file": (
        BadCheckpoint,
        {name: Row(damage, message, "config.json") for name, (damage, message) in
         CONFIG_FILE.items()},
        0,
    ),
    "config": (BadSpec, CONFIG, 0),
    "weights": (BadWeights, WEIGHTS, 0),
}  # fmt: skip
CASES = [
    pytest.param(kind, row, shards, id=f"{table}: {name}")
    for table, (kind, rows, shards) in TABLES.items()
    for name, row in rows.items()
]


@pytest.mark.parametrize(("kind", "row", "shards"), CASES)
def test_refused(
    tmp_path: Path, capsys: Capture, kind: type[MoecError], row: Row, shards: int
) -> None:
    path = small.write(tmp_path / "model", None, None, shards)
    row.damage(path)
    error = refusal(path)
    assert type(error) is kind and row.message in error.message, str(error)
    assert error.where and row.where in error.where
    assert error.need and error.hint and error.exit_code == 3
    assert all(name in str(error) for name in row.names), str(error)
    assert "\x1b" not in str(error) and str(error).encode()

    assert cli.main(["inspect", str(path)]) == 3
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[0].startswith("moec: error: ") and "Traceback" not in err
    assert [line[:7] for line in lines if line.startswith("  ") and line[2] != "-"] == [
        "  in   ", "  need ", "  try  "]  # fmt: skip
    if out:  # a description, and after it every problem
        assert kind is BadWeights and "listed above" in lines[0]
        assert error.message.splitlines()[0].split(" with the")[0] in out
    else:
        assert row.message in err


def refusal(path: Path) -> MoecError:
    """The error of reading headers, or of the weights that they describe."""
    with pytest.raises(MoecError) as caught:
        read_model(path)
    return caught.value


def test_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A million entries take a second to parse, so the limit is lowered instead.
    monkeypatch.setattr(header, "MAX_TENSORS", 5)
    error = refusal(small.write(tmp_path))
    assert type(error) is BadCheckpoint and "28 tensors in one file" in error.message
    assert error.need == "at most 5"


@pytest.mark.parametrize("what", ["nothing", "file", "long name"])
def test_no_directory(tmp_path: Path, capsys: Capture, what: str) -> None:
    path = {"nothing": tmp_path / "none", "long name": tmp_path / ("n" * 300)}.get(
        what, small.write(tmp_path / "model") / SINGLE
    )
    message = {
        "nothing": "there is no such directory",
        "file": "this is a file, not a model directory",
        "long name": "cannot be listed: ",
    }[what]
    error = refusal(path)
    assert type(error) is BadCheckpoint and message in error.message
    assert error.where == str(path) and error.need and error.hint
    assert cli.main(["inspect", str(path)]) == 3
    assert f"moec: error: {message}" in capsys.readouterr().err


def test_values(tmp_path: Path, capsys: Capture) -> None:
    """Headers do not tell of NaN: compiling reads the values, and leaves nothing behind.

    Every place and kind of value is tried without a compilation in tests/weights.
    """
    damage = arrays(lambda t: t[UP].reshape(-1).__setitem__(-1, np.nan))
    path = small.write(tmp_path / "model")
    damage(path)
    assert not survey(path).problems
    out = tmp_path / "out.moec"
    assert cli.main(["compile", str(path), "-o", str(out), "--schedule", "loop", "-q"]) == 3
    assert capsys.readouterr().err.splitlines() == [
        f"moec: error: tensor {UP!r} holds NaN or Inf",
        f"  in   {path / SINGLE}",
        "  need finite weights",
        "  try  download the file again, or pass --allow-nonfinite to take it as it is",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
