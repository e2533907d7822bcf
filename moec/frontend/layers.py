"""Which layers are MoE layers: the layer rule of a family, evaluated for every layer.

A rule is a list of cases. The first case whose `given` fields are present decides; a layer
is an MoE layer when all conditions of that case hold (no conditions: all layers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .faults import bad_config, bad_family
from .values import Fields, resolve

# More layers and experts than any model has; the config could make us count for hours.
MAX_LAYERS = 1 << 12
MAX_LAYERS_EXPERTS = 1 << 20


def moe_layers(fields: Fields) -> tuple[int, ...]:
    """The MoE layers among 0 .. num_layers-1; BadSpec when there is none or a field is off."""
    count, experts = fields.values["num_layers"], fields.values["num_experts"]
    if count > MAX_LAYERS or (type(experts) is int and count * experts > MAX_LAYERS_EXPERTS):
        raise bad_config(
            f"{fields.describe(('num_layers', 'num_experts'))} is more than any model has",
            f"at most {MAX_LAYERS} layers and {MAX_LAYERS_EXPERTS} experts in all of them",
        )
    case = _choose(fields)
    layers = tuple(
        layer for layer in range(count) if all(_holds(c, layer, count, fields) for c in case)
    )
    if not layers:
        names = tuple(
            n for n in fields.values if any(f"${n}" in map(str, c.values()) for c in case)
        )
        raise bad_config(
            f"none of the {count} layers is an MoE layer",
            "at least one MoE layer",
            f"decided by {fields.describe(names)}" if names else None,
        )
    return layers


def _choose(fields: Fields) -> list[dict[str, Any]]:
    cases = fields.family.layers or ({},)
    for case in cases:
        given = case.get("given", [])
        if all(resolve(f"${name}", fields) is not None for name in given):
            return list(case.get("all", []))
    raise bad_config(
        f"the layer rule of {fields.family.family} does not say which layers are MoE layers",
        " or ".join(fields.key(n) for case in cases for n in case.get("given", [])),
    )


def _holds(condition: dict[str, Any], layer: int, count: int, fields: Fields) -> bool:
    for name, function in _CONDITIONS.items():
        if name in condition:
            values = {k: resolve(v, fields) for k, v in condition.items()}
            _judge(values, name, fields)
            reference = condition[name]
            key = fields.key(reference[1:]) if str(reference).startswith("$") else name
            return function(values, layer, count, key)
    raise bad_family(
        f"unknown layer condition {sorted(condition)}",
        fields.family.source,
        ", ".join(_CONDITIONS),
    )


def _judge(values: dict[str, Any], condition: str, fields: Fields) -> None:
    """Refuse an argument of the wrong type, which is a mistake in the family file."""
    for key, value in values.items():
        fits = _ARGUMENTS.get(key)
        if fits is not None and not fits(value):
            raise bad_family(
                f"layers: {key} = {value!r} does not fit the condition {condition!r}",
                fields.family.source,
                "a value of the type that the condition compares",
            )


def _whole(value: Any) -> bool:
    return type(value) is int


def _list(item: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(v) is item for v in value)


_ARGUMENTS: dict[str, Callable[[Any], bool]] = {
    "in": _list(int),
    "not_in": lambda value: value is None or _list(int)(value),
    "period": _whole,
    "offset": _whole,
    "start": _whole,
    "end": _whole,
    "types": _list(str),
    "moe": lambda value: isinstance(value, str),
    "other": _list(str),
    "flags": lambda value: isinstance(value, list),
}


def _in(v: dict[str, Any], layer: int, count: int, key: str) -> bool:
    return layer in _inside(v["in"], count, key)


def _not_in(v: dict[str, Any], layer: int, count: int, key: str) -> bool:
    return layer not in (v["not_in"] or [])


def _inside(values: list[int], count: int, key: str) -> list[int]:
    outside = [n for n in values if not 0 <= n < count]
    if outside:
        raise bad_config(f"{key} names layer {outside[0]}", f"0 to {count - 1}")
    return values


def _period(v: dict[str, Any], layer: int, count: int, key: str) -> bool:
    if v["period"] < 1:
        raise bad_config(f"{key}: {v['period']} is no period", "1 or more")
    return bool((layer - v.get("offset", 0)) % v["period"] == 0)


def _start(v: dict[str, Any], layer: int, count: int, key: str) -> bool:
    return bool(layer >= v["start"])


def _end(v: dict[str, Any], layer: int, count: int, key: str) -> bool:
    return bool(v["end"] == -1 or layer <= v["end"])


def _entry(values: list[Any], layer: int, count: int, key: str) -> Any:
    if len(values) < count:
        raise bad_config(
            f"{key} has {len(values)} entries for {count} layers", "one entry per layer"
        )
    return values[layer]


def _types(v: dict[str, Any], layer: int, count: int, key: str) -> bool:
    value = _entry(v["types"], layer, count, key)
    if value != v["moe"] and value not in v["other"]:
        raise bad_config(
            f"{key}: {value!r} of layer {layer} is not known", " or ".join([v["moe"], *v["other"]])
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
