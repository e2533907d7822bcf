"""Every example runs, stays short, says what it shows, and shows it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# What the output must match, line for line.
SHOWN = {
    "compile_and_run": [r"<moec\.Block layer 0 .*> differs from NumPy by at most \d\.\d+e-0[78]"],
    "external_router": [
        "own router as the block's: True",
        "two halves add up to the whole: True",
        "repeated ids add up: True",
        "topk_ids holds 99",
        "  in   topk_ids",
        r"  need ids in \[0, 8\)",
        "  try  .*",
    ],
    "torch_tensors": [
        r"Tensor \(3, 64\) torch\.float32",
        "in place: True True",
        "rows of a larger tensor: True",
        "x requires a gradient, .*",
        "  in   x",
        "  need .*",
        "  try  .*no_grad.*",
    ],
}


def test_every_example_is_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SHOWN.keys()


@pytest.mark.parametrize("name", SHOWN)
def test_example(name: str) -> None:
    path = EXAMPLES / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)) and len(text.splitlines()) < 40
    run = subprocess.run(
        [sys.executable, path],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert len(lines) == len(SHOWN[name]), run.stdout
    for line, pattern in zip(lines, SHOWN[name], strict=True):
        assert re.fullmatch(pattern, line), line
