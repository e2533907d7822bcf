"""Spec dataclasses from plain data and back, strictly: an unknown field is an error."""

from __future__ import annotations

import enum
import types
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import BadSpec


def plain(value: Any) -> Any:
    """Enums become their values, tuples lists: what JSON can hold."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def restore(cls: Any, data: Any, path: str = "spec") -> Any:
    """A spec dataclass from plain data; raises BadSpec on unknown or missing fields."""
    if not isinstance(data, dict):
        raise BadSpec(f"{path}: expected an object, got {type(data).__name__}", where=path)
    unknown = sorted(set(data) - {f.name for f in fields(cls)})
    if unknown:
        raise BadSpec(f"{path}: unknown field {unknown[0]!r}", where=path)
    hints = get_type_hints(cls)
    values = {name: _value(hints[name], value, f"{path}.{name}") for name, value in data.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise BadSpec(f"{path}: {error}", where=path) from None


def _value(kind: Any, value: Any, path: str) -> Any:
    """`value` as the annotation `kind` has it; numbers and texts are checked by their class."""
    if get_origin(kind) in (Union, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in get_args(kind) if k is not type(None))
    if is_dataclass(kind):
        return restore(kind, value, path)
    if get_origin(kind) is tuple:
        return _pairs(value, path)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _member(kind, value, path)
    # No class checks its flags itself, and any text would count as true.
    if kind is bool and not isinstance(value, bool):
        raise BadSpec(f"{path}: {value!r} is neither true nor false", where=path)
    return value


def _member(kind: type[enum.Enum], value: Any, path: str) -> enum.Enum:
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(str(m.value) for m in kind)
        raise BadSpec(f"{path}: {value!r} is unknown", where=path, need=allowed) from None


def _pairs(value: Any, path: str) -> tuple[tuple[str, str], ...]:
    try:
        return tuple((str(k), str(v)) for k, v in value)
    except (TypeError, ValueError):
        raise BadSpec(f"{path}: {value!r} is no list of pairs", where=path) from None
