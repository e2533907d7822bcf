"""Commands that cannot be carried out: class, exit code and message, and no traceback.

The classes that no checkpoint, artifact or tensor alone can cause: wrong arguments, targets,
results that differ from what was expected, and too little memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moec import cli
from moec.errors import CheckFailed, InputError, MoecError, ResourceError, TargetError, UsageError
from tests.bad_inputs.test_artifact_inputs import TARGET, at, manifest
from tests.frontend import small
from tests.runtime import fake

Arguments = Callable[[Path], list[str]]


def checkpoint(folder: Path) -> str:
    return str(small.write(folder / "model"))


def x(folder: Path, *shape: int) -> str:
    np.save(folder / "x.npy", np.zeros(shape, "f4"))
    return str(folder / "x.npy")


def run(folder: Path, *more: str) -> list[str]:
    return ["run", str(fake.shared()), "--layer", "1", "--input", x(folder, 3, fake.H), *more]


def greedy(folder: Path) -> list[str]:
    """An artifact whose function wants a petabyte of workspace."""
    path = fake.copied(folder)
    variant = (*TARGET, "functions", "moe", "variants", 0, "workspace")
    manifest(targets=at(*variant, value=[1 << 50, 0]))(path)
    return ["run", str(path), "--layer", "1", "--input", x(folder, 3, fake.H)]


ROWS: dict[str, tuple[Arguments, type[MoecError], int, str]] = {
    "layer": (lambda f: ["compile", checkpoint(f), "-o", str(f / "o"), "--layers", "0,7"],
              UsageError, 2, "layer 7 is not an MoE layer of this checkpoint"),
    "layers": (lambda f: ["compile", checkpoint(f), "-o", str(f / "o"), "--layers", "a"],
               UsageError, 2, "'a' is neither a layer nor a range of layers"),
    "output": (lambda f: ["compile", checkpoint(f), "-o", str(f / "model")],
               UsageError, 2, "the output exists and is not an artifact"),
    "no artifact": (lambda f: ["verify", checkpoint(f)], UsageError, 2, "no artifact here"),
    "target": (lambda f: ["compile", checkpoint(f), "-o", str(f / "o"), "-t", "abacus"],
               TargetError, 4, "abacus"),
    "schedule": (lambda f: ["compile", checkpoint(f), "-o", str(f / "o"), "--schedule", "abacus"],
                 TargetError, 4, "abacus"),
    "device": (lambda f: run(f, "--device", "cuda:0"), TargetError, 4, "device"),
    "input": (lambda f: [*run(f)[:-1], x(f, 3, 9)], InputError, 3, "x has shape [3, 9]"),
    "digest": (lambda f: ["verify", str(fake.shared()), "--digest", "0" * 64],
               CheckFailed, 5, "it is not the one asked for"),
    "expected": (lambda f: run(f, "--expect", expected(f)), CheckFailed, 5, "y differs from what"),
    "workspace": (greedy, ResourceError, 6, "of workspace, which cannot be allocated"),
}  # fmt: skip


def expected(folder: Path) -> str:
    np.save(folder / "y.npy", np.full((3, fake.H), 7, "f4"))
    return str(folder / "y.npy")


@pytest.mark.parametrize("row", ROWS)
def test_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    row: str,
) -> None:
    arguments, kind, code, message = ROWS[row]
    raised: list[MoecError] = []
    report = cli._report

    def spy(error: MoecError, console: object) -> int:
        raised.append(error)
        return report(error, console)

    monkeypatch.setattr(cli, "_report", spy)
    argv = arguments(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert cli.main(argv) == code
    err = capsys.readouterr().err
    assert [type(error) for error in raised] == [kind], err
    assert message in raised[0].message and (raised[0].need or raised[0].hint)
    assert err.startswith("moec: error: ") and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
