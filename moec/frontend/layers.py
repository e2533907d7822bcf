"""Which layers are MoE layers: the layer rule of a family, evaluated for every layer.

A rule is a list of cases. The first case whose `given` fields are present decides; a layer
is an MoE layer when all conditions of that case hold (no conditions: all layers).
"""

from __future__ import annotations

from typing import Any

from ..errors import BadSpec
from .values import Fields, resolve


def moe_layers(fields: Fields) -> tuple[int, ...]:
    """The MoE layers among 0 .. num_layers-1; BadSpec when there is none or a field is off."""
    count = fields.values["num_layers"]
    case = _choose(fields)
    layers = tuple(
        layer for layer in range(count) if all(_holds(c, layer, count, fields) for c in case)
    )
    if not layers:
        names = tuple(
            n for n in fields.values if any(f"${n}" in map(str, c.values()) for c in case)
        )
        raise BadSpec(
            f"none of the {count} layers is an MoE layer",
            where="config.json",
            need="at least one MoE layer",
            hint=f"decided by {fields.describe(names)}" if names else None,
        )
    return layers


def _choose(fields: Fields) -> list[dict[str, Any]]:
    cases = fields.family.layers or ({},)
    for case in cases:
        given = case.get("given", [])
        if all(resolve(f"${name}", fields) is not None for name in given):
            return list(case.get("all", []))
    raise BadSpec(
        f"the layer rule of {fields.family.family} does not say which layers are MoE layers",
        where="config.json",
        need=" or ".join(fields.key(n) for case in cases for n in case.get("given", [])),
    )


def _holds(condition: dict[str, Any], layer: int, count: int, fields: Fields) -> bool:
    for name, function in _CONDITIONS.items():
        if name in condition:
            values = {k: resolve(v, fields) for k, v in condition.items()}
            reference = condition[name]
            key = fields.key(reference[1:]) if str(reference).startswith("$") else name
            return function(values, layer, count, key)
    raise BadSpec(
        f"unknown layer condition {sorted(condition)}",
        where=fields.family.source,
        need=", ".join(_CONDITIONS),
    )


def _in(v: dict[str, Any], layer: int, count: int, key: str) -> bool:
    return layer in _inside(v["in"], count, key)


def _not_in(v: dict[str, Any], layer: int, count: int, key: str) -> bool:
    return layer not in (v["not_in"] or [])


def _inside(values: list[int], count: int, key: str) -> list[int]:
    outside = [n for n in values if not 0 <= n < count]
    if outside:
        raise BadSpec(
            f"{key} names layer {outside[0]}", where="config.json", need=f"0 to {count - 1}"
        )
    return values


def _period(v: dict[str, Any], layer: int, count: int, key: str) -> bool:
    if v["period"] < 1:
        raise BadSpec(f"{key}: {v['period']} is no period", where="config.json", need="1 or more")
    return bool((layer - v.get("offset", 0)) % v["period"] == 0)


def _start(v: dict[str, Any], layer: int, count: int, key: str) -> bool:
    return bool(layer >= v["start"])


def _end(v: dict[str, Any], layer: int, count: int, key: str) -> bool:
    return bool(v["end"] == -1 or layer <= v["end"])


def _entry(values: list[Any], layer: int, count: int, key: str) -> Any:
    if len(values) < count:
        raise BadSpec(
            f"{key} has {len(values)} entries for {count} layers",
            where="config.json",
            need="one entry per layer",
        )
    return values[layer]


def _types(v: dict[str, Any], layer: int, count: int, key: str) -> bool:
    value = _entry(v["types"], layer, count, key)
    if value != v["moe"] and value not in v["other"]:
        raise BadSpec(
            f"{key}: {value!r} of layer {layer} is not known",
            where="config.json",
            need=" or ".join([v["moe"], *v["other"]]),
        )
    return bool(value == v["moe"])


def _flags(v: dict[str, Any], layer: int, count: int, key: str) -> bool:
    return bool(_entry(v["flags"], layer, count, key))


def _enabled(v: dict[str, Any], layer: int, count: int, key: str) -> bool:
    return bool(v["enabled"])


_CONDITIONS = {
    "in": _in,
    "not_in": _not_in,
    "period": _period,
    "start": _start,
    "end": _end,
    "types": _types,
    "flags": _flags,
    "enabled": _enabled,
}
