"""Checks of single fields: each raises a BadSpec that names the field."""

from __future__ import annotations

import math
from typing import Any

from ..errors import BadSpec


def check(ok: bool, field: str, message: str) -> None:
    """Raise unless `ok`."""
    if not ok:
        raise BadSpec(f"{field}: {message}", where=field)


def whole(value: Any, field: str, low: int, high: int) -> None:
    """Raise unless `value` is an integer from `low` to `high`; a bool is none."""
    ok = isinstance(value, int) and not isinstance(value, bool)
    check(ok, field, f"{value!r} is not an integer")
    check(low <= value <= high, field, f"{value} is outside [{low}, {high}]")


def finite(value: Any, field: str) -> None:
    """Raise unless `value` is a number, neither infinite nor NaN."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    check(ok, field, f"{value!r} is not a finite number")
