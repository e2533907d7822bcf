"""Numbers for people: bytes, counts and ranges; imports nothing."""

from __future__ import annotations

from collections.abc import Sequence


def size(count: int) -> str:
    """Bytes for people: 805.3 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def amount(count: int) -> str:
    """A count for people: 12,345 or 30.5 billion (a B would read as bytes)."""
    if count < 1_000_000:
        return f"{count:,}"
    value, unit = count / 1e6, "million"
    for larger in ("billion", "trillion"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as 0-3,7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
