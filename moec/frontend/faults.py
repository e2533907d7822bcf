"""Errors about the two files that people write: config.json and a family file."""

from __future__ import annotations

from typing import Any

from ..errors import BadSpec


def bad_config(message: str, need: str, hint: str | None = None) -> BadSpec:
    """A BadSpec about config.json."""
    return BadSpec(
        message,
        where="config.json",
        need=need,
        hint=hint or "correct config.json, or download it again",
    )


def bad_family(message: str, where: str, need: str) -> BadSpec:
    """A BadSpec about the family file `where`."""
    return BadSpec(
        message,
        where=where,
        need=need,
        hint="moec/frontend/families/_template.toml says what each key means",
    )


def shown(value: Any) -> str:
    """A value of an untrusted file as printable text of bounded length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
