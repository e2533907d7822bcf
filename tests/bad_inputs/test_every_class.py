"""No error class without a bad input that ends in it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from moec import errors

# Bases, which nothing raises itself.
ABSTRACT = {"MoecError", "BadInput"}
CLASSES = sorted(
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.MoecError) and name not in ABSTRACT
)


def used(path: Path) -> set[str]:
    """The names that the code of a test file uses (its imports do not count)."""
    return {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_class_has_a_row(name: str) -> None:
    here = Path(__file__)
    tables = [p for p in here.parent.glob("test_*.py") if p != here]
    assert any(name in used(path) for path in tables), f"no bad input ends in {name}"


def test_every_class_has_an_exit_code_of_its_kind() -> None:
    codes = {name: getattr(errors, name).exit_code for name in CLASSES}
    assert codes == {
        "ArtifactError": 5,
        "BadCheckpoint": 3,
        "BadSpec": 3,
        "BadWeights": 3,
        "CheckFailed": 5,
        "InputError": 3,
        "ResourceError": 6,
        "TargetError": 4,
        "UsageError": 2,
    }
