"""The source tree itself: who may import whom, file sizes, docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import moec

ROOT = Path(moec.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A part of moec -> the parts that it may import. Data flows down this table, so no part
# imports a later one; the readers of checkpoints are part of the frontend's stage, but know
# nothing of ops, so that the runtime may pack weights that stayed in a checkpoint.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "text": set(),
    "spec": {"errors"},
    "host": {"errors"},
    "target": {"errors", "host"},
    "formats": {"errors", "spec"},
    "ops": {"errors", "spec", "formats"},
    "checkpoint": {"errors"},
    "weights": {"errors", "spec", "formats", "checkpoint"},
    "frontend": {"errors", "text", "spec", "formats", "ops", "checkpoint", "weights"},
    "schedules": {"errors", "spec", "target", "formats", "ops"},
    "artifact": {"errors", "spec", "target", "host"},
    "compiler": {
        "errors", "text", "spec", "target", "host", "formats", "ops", "checkpoint", "weights",
        "frontend", "schedules", "artifact",
    },
    "runtime": {"errors", "spec", "target", "host", "artifact", "checkpoint", "weights"},
}  # fmt: skip
# These may import anything, and nothing of the table may import them.
TOOLS = {"cli", "quickstart", "selftest", "integrations", "tune"}
# The package itself and `python -m moec`.
ENTRANCES = {"__init__", "__main__"}
# What the runtime may not import even late. It finds torch and tvm_ffi where the caller has
# brought them; that nothing heavy is loaded is a test of the runtime in a fresh process.
NOT_IN_RUNTIME = {"tvm", "torch", "onnx", "safetensors", "transformers"}
# Longer than 400 lines, and why it is one thought all the same.
LONG = {
    "schedules/cuda/decode.py": "one thought: two kernels that hand over to each other",
    "schedules/cuda/stream.py": "one thought: a single kernel in several widths",
}


def part(path: Path) -> str:
    """The part of moec that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path, text: str) -> Iterator[tuple[str, int]]:
    """(absolute name, line) of everything that a file imports, inside functions too."""
    package = ("moec", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *((node.module,) if node.module else ())))
            # `from . import x` may import the module x, so both names are looked at.
            yield module, node.lineno
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno


def forbidden(path: Path, text: str) -> Iterator[str]:
    """Every import of a file that points up the table, as file:line and reason."""
    own = part(path)
    if own in TOOLS | ENTRANCES:
        return
    for name, line in imports(path, text):
        first, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if first == "moec" and other in MAY_IMPORT.keys() | TOOLS:
            if other != own and other not in MAY_IMPORT[own]:
                yield f"{path}:{line}: {own} may not import {other}"
        elif own in ("runtime", "artifact", "checkpoint", "weights") and first in NOT_IN_RUNTIME:
            yield f"{path}:{line}: {own} may not import {first}"


def test_every_part_has_a_row() -> None:
    known = MAY_IMPORT.keys() | TOOLS | ENTRANCES
    assert {part(path) for path in FILES} <= known
    assert set().union(*MAY_IMPORT.values()) <= MAY_IMPORT.keys()


def test_the_table_has_no_circle() -> None:
    done: list[str] = []
    for name, allowed in MAY_IMPORT.items():
        assert allowed <= set(done), f"{name} may import a later part"
        done.append(name)


def test_imports_point_down() -> None:
    bad = [line for path in FILES for line in forbidden(path, path.read_text(encoding="utf-8"))]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("file", "text", "bad"),
    [
        ("runtime/a.py", "import numpy\nfrom ..artifact import Artifact", False),
        ("runtime/a.py", "\n\nfrom ..frontend import read_model", True),
        ("runtime/a.py", "def f():\n    from .. import compiler", True),
        ("runtime/a.py", "from moec.ops.define import OpDef", True),
        ("runtime/a.py", "import tvm", True),
        ("runtime/a.py", "from tvm import relax", True),
        ("runtime/a.py", "import torch", True),
        ("ops/a.py", "from tvm import relax\nfrom ..spec import MoESpec", False),
        ("ops/a.py", "from ..schedules.cpu import kernel", True),
        ("frontend/families/a.py", "from ...schedules import backend", True),
        ("frontend/a.py", "from ..weights import WeightPlan\nfrom . import family", False),
        ("schedules/cpu/a.py", "from ...frontend.graph import build_graph", True),
        ("schedules/cpu/a.py", "from ..base import Schedule\nfrom . import emit", False),
        ("errors.py", "from .spec import MoESpec", True),
        ("compiler/a.py", "from ..runtime import load", True),
        ("compiler/a.py", "import moec.cli", True),
        ("cli/a.py", "from ..compiler import compile", False),
    ],
)
def test_the_check_itself(file: str, text: str, bad: bool) -> None:
    found = list(forbidden(ROOT / file, text))
    assert bool(found) == bad
    lines = text.splitlines()
    where = next(n for n, line in enumerate(lines, 1) if "import" in line)
    assert all(f"{file}:{where}: " in line for line in found)


def test_no_file_is_long() -> None:
    """Files stay near 150 lines; 400 is a reason to split."""
    long = {
        path.relative_to(ROOT).as_posix(): count
        for path in FILES
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert long.keys() == LONG.keys(), f"split it, or say why not: {long}"


def test_every_module_says_what_it_is() -> None:
    """A docstring whose first line is the module's contract, on one line."""
    bad = []
    for path in FILES:
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if not doc or doc.splitlines()[0].strip()[-1:] not in (".", ":"):
            bad.append(f"{path}: {doc.splitlines()[:1]}")
    assert not bad, "\n".join(bad)


def test_nothing_pickles_or_evaluates() -> None:
    """No reader of this project executes what it reads."""
    names = {"pickle", "cloudpickle", "marshal", "shelve", "dill", "joblib"}
    bad = [
        f"{path}:{line}: {name}"
        for path in FILES
        for name, line in imports(path, path.read_text(encoding="utf-8"))
        if name.split(".")[0] in names
    ]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("eval", "exec"):
                bad.append(f"{path}:{node.lineno}: {node.func.id}")
    assert not bad, "\n".join(bad)
