"""Pieces and parameters that contradict themselves are refused when they are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.checkpoint import Checkpoint
from moec.errors import BadWeights
from moec.weights import ParamPlan, Piece, WeightPlan
from tests.frontend import small

PIECE = Piece("w", (4, 6), (0, 4), ((0, 4, 1), (0, 6, 1)), False)
STACK = Piece("w", (2, 4, 6), (0, 4), ("e", (0, 4, 1), (0, 6, 1)), False)
RUNS = Piece("w", (8, 6), (0, 4), (("e", 4), (0, 6, 1)), False)


def test_used_twice_and_used_in_part(tmp_path: Path) -> None:
    arrays = {"w": np.ones((4, 6), "f4"), "v": np.ones((4, 6), "f4")}
    path = small.write(tmp_path, {}, arrays)
    half = Piece("v", (4, 6), (0, 2), ((0, 2, 1), (0, 6, 1)), False)
    plan = WeightPlan(
        (
            ("a", ParamPlan((4, 6), "float32", False, (PIECE,))),
            ("b", ParamPlan((4, 6), "float32", False, (PIECE,))),
            ("c", ParamPlan((2, 6), "float32", False, (half,))),
        )
    )
    with Checkpoint.open(path) as checkpoint:
        assert [str(p) for p in plan.problems(checkpoint)] == [
            "the same part of 'w' is used twice",
            "48 of the 24 elements of 'w' are used (need every element used once)",
            "12 of the 24 elements of 'v' are used (need every element used once)",
        ]


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "slices": (lambda: Piece("w", (4, 6), (0, 4), ((0, 4, 1),), False), "1 slices for shape"),
    "backward": (lambda: Piece("w", (4,), (0, 4), ((0, 4, -1),), False), "is not forward"),
    "negative": (lambda: Piece("w", (4,), (0, 4), ((-4, 4, 1),), False), "is not forward"),
    "runs of none": (lambda: Piece("w", (4,), (0, 4), (("e", 0),), False), "is not forward"),
    "no axis": (lambda: Piece("w", (4,), (0, 4), ("x",), False), "is not forward"),
    "rows": (lambda: ParamPlan((5, 6), "float32", False, (PIECE,)), "fill 4 of 5 rows"),
    "width": (lambda: ParamPlan((4, 5), "float32", False, (PIECE,)), "does not fill rows"),
    "gap": (lambda: ParamPlan((8, 6), "float32", False, (PIECE, PIECE)), "do not follow row 4"),
    "experts": (lambda: ParamPlan((3, 4, 6), "float32", True, (STACK,)), "has no 3 experts"),
    "run": (lambda: ParamPlan((3, 4, 6), "float32", True, (RUNS,)), "has no 3 experts"),
    "no rows": (lambda: ParamPlan((3,), "float32", True, ()), "has no rows"),
}


@pytest.mark.parametrize("row", BROKEN)
def test_plans_that_make_no_sense(row: str) -> None:
    make, message = BROKEN[row]
    with pytest.raises(BadWeights) as caught:
        make()
    assert message in caught.value.message
