"""Specs as op attributes: only what differs from the default, nested specs with a prefix."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from ..spec import restore

S = TypeVar("S")


def to_attrs(spec: Any, prefix: str = "") -> dict[str, Any]:
    """{"score": "softmax", "groups_count": 4, ...} from a spec dataclass."""
    out: dict[str, Any] = {}
    for field in fields(spec):
        value = getattr(spec, field.name)
        if value is None or (field.default is not MISSING and value == field.default):
            continue
        name = prefix + field.name
        if is_dataclass(value):
            out.update(to_attrs(value, f"{name}_"))
        else:
            out[name] = value.value if isinstance(value, enum.Enum) else value
    return out


def from_attrs(cls: type[S], attrs: Mapping[str, Any], nested: tuple[str, ...] = ()) -> S:
    """The inverse of `to_attrs`; `nested` names the fields that are specs themselves."""
    data: dict[str, Any] = {}
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for key, value in attrs.items():
        for field in nested:
            if key.startswith(f"{field}_"):
                data.setdefault(field, {})[key[len(field) + 1 :]] = value
                break
        else:
            if key in known:
                data[key] = value
    spec: S = restore(cls, data)
    return spec
