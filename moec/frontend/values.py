"""Config fields as a family declares them, and the templates that refer to them.

A template is a literal, "$field", "$layer" (the number of the layer), a table or list of
templates, or one operator table:
{ if, then, else }   { map, to }   { product }   { sum }   { power }   { first }   { less }
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .family import Family, Field, common
from .faults import bad_config, bad_family, shown

Config = dict[str, Any]
MAX_ENTRIES = 1 << 12  # of a list, which says something of each layer


@dataclass(frozen=True)
class Fields:
    """The resolved config entries of one model, by the names that the family gave them."""

    family: Family
    values: dict[str, Any]

    def at(self, layer: int) -> Fields:
        """The same entries as they are for one layer, which `$layer` then names."""
        values: dict[str, Any] = {"layer": layer}
        for name, value in self.values.items():
            if self.family.config[name].per_layer and isinstance(value, list):
                if layer >= len(value):
                    raise bad_config(
                        f"{self.key(name)} has {len(value)} entries, none for layer {layer}",
                        "one entry per layer",
                    )
                value = value[layer]
            values[name] = value
        return Fields(self.family, values)

    def key(self, name: str) -> str:
        """The name in config.json, for messages."""
        return " / ".join(self.family.config[name].keys)

    def describe(self, names: tuple[str, ...]) -> str:
        """`num_experts_per_tok = 2, ...` for messages."""
        return ", ".join(f"{self.key(n)} = {self.values[n]}" for n in names)


def read_fields(family: Family, config: Config) -> Fields:
    """Every declared field of `config`; BadSpec names the field that is absent or wrong."""
    fields = Fields(family, {n: _read(n, f, config) for n, f in family.config.items()})
    for name, allowed in family.require.items():
        value = fields.values[name]
        if value is not None and not _allowed(value, allowed):
            raise bad_config(
                f"{fields.key(name)}: {shown(value)} is not known for the family {family.family}",
                " or ".join(repr(a) for a in allowed),
                "the layer may compute something else; if not, describe it with --family FILE",
            )
    return fields


def _allowed(value: Any, allowed: list[Any]) -> bool:
    # 1 == True in Python: a number must not pass for a flag.
    return any(value == a and (type(value) is type(a) or type(a) is float) for a in allowed)


def find(config: Config, key: str) -> tuple[bool, Any]:
    """(whether `config` has `key`, a name or a path of names, and its value)."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _read(name: str, field: Field, config: Config) -> Any:
    looked_up = {key: find(config, key) for key in field.keys}
    present = {key: value for key, (there, value) in looked_up.items() if there}
    if field.kind == "length":
        present = {k: len(v) if isinstance(v, (list, str)) else v for k, v in present.items()}
    if not present:
        if field.required:
            raise bad_config(f"{' / '.join(field.keys)} is missing", _WORDS[field.kind])
        return field.default
    values = list(present.values())
    if any(v != values[0] or type(v) is not type(values[0]) for v in values[1:]):
        every = ", ".join(f"{k} = {shown(v)}" for k, v in present.items())
        raise bad_config(f"{every} contradict each other", "one value")
    key, value = next(iter(present.items()))
    if value is None:
        if field.optional:
            return None
        raise bad_config(f"{key} is null", _WORDS[field.kind])
    if field.per_layer and isinstance(value, list):
        return [None if v is None else _typed(key, field.kind, v) for v in value]
    return _typed(key, field.kind, value)


_WORDS = {
    "size": "a positive integer",
    "length": "a positive integer",
    "count": "an integer of at least 0",
    "integer": "an integer",
    "number": "a finite number",
    "flag": "true or false",
    "text": "a string",
    "ints": "a list of integers",
    "texts": "a list of strings",
}


def _typed(key: str, kind: str, value: Any) -> Any:
    if kind == "ints" and isinstance(value, str):  # "3,4,5" in the config of one family
        parts = [part.strip() for part in value.split(",") if part.strip()]
        value = [int(part) if part.isdecimal() else part for part in parts]
    if not _fits(kind, value):
        raise bad_config(f"{key}: {shown(value)} is not valid", _WORDS[kind])
    return float(value) if kind == "number" else value


def _fits(kind: str, value: Any) -> bool:
    whole = type(value) is int and abs(value) < 1 << 40
    if kind in ("size", "length"):
        return whole and value >= 1
    if kind == "count":
        return whole and value >= 0
    if kind == "integer":
        return whole
    if kind == "number":
        return whole or (type(value) is float and math.isfinite(value))
    if kind == "flag":
        return type(value) is bool
    if kind == "text":
        return isinstance(value, str)
    item = int if kind == "ints" else str
    return (
        isinstance(value, list)
        and len(value) <= MAX_ENTRIES
        and all(type(v) is item for v in value)
    )


def resolve(template: Any, fields: Fields) -> Any:
    """The value of a template; BadSpec when it does not fit the config or is malformed."""
    if isinstance(template, str) and template.startswith("$"):
        return _lookup(template, fields)
    if isinstance(template, list):
        return [resolve(t, fields) for t in template]
    if isinstance(template, dict):
        for operator, function in _OPERATORS.items():
            if operator in template:
                return function(template, fields)
        return {k: resolve(v, fields) for k, v in template.items()}
    return template


def _lookup(reference: Any, fields: Fields) -> Any:
    name = reference[1:] if isinstance(reference, str) else None
    if name not in fields.values:
        raise bad_family(
            f"{reference!r} refers to no config field",
            fields.family.source,
            ", ".join(fields.values),
        )
    return fields.values[name]


def _if(template: Config, fields: Fields) -> Any:
    chosen = "then" if resolve(template["if"], fields) else "else"
    return resolve(template.get(chosen), fields)


def _map(template: Config, fields: Fields) -> Any:
    value = resolve(template["map"], fields)
    if isinstance(value, bool):
        value = str(value).lower()  # as TOML and JSON write it
    table = template["to"]
    if isinstance(table, str):
        table = common().maps[table]
    if str(value) not in table:
        raise bad_config(
            f"{fields.key(template['map'][1:])}: {shown(value)} is not known",
            ", ".join(sorted(table)),
            f"the family file {fields.family.source} says what each name means",
        )
    return resolve(table[str(value)], fields)


def _numbers(template: Config, operator: str, fields: Fields) -> list[Any]:
    values = [resolve(t, fields) for t in template[operator]]
    if any(v is None for v in values):
        return []
    if not all(type(v) in (int, float) for v in values):
        raise bad_family(
            f"{template}: {values} are not numbers",
            fields.family.source,
            "numbers, or fields of a kind that is a number",
        )
    return values


def _product(template: Config, fields: Fields) -> Any:
    values = _numbers(template, "product", fields)
    return math.prod(values) if values else None


def _sum(template: Config, fields: Fields) -> Any:
    values = _numbers(template, "sum", fields)
    return sum(values) if values else None


def _less(template: Config, fields: Fields) -> Any:
    values = _numbers(template, "less", fields)
    return bool(values) and values[0] < values[1]


def _power(template: Config, fields: Fields) -> Any:
    values = _numbers(template, "power", fields)
    if not values:
        return None
    try:
        return math.pow(*values)
    except (ValueError, OverflowError):  # 0 to a negative power, a negative base, a huge result
        raise bad_config(f"{values[0]} to the power of {values[1]} is no number", "a number"
                         ) from None  # fmt: skip


def _first(template: Config, fields: Fields) -> Any:
    values = (resolve(t, fields) for t in template["first"])
    return next((v for v in values if v is not None), None)


_OPERATORS = {
    "if": _if,
    "map": _map,
    "product": _product,
    "sum": _sum,
    "power": _power,
    "first": _first,
    "less": _less,
}
