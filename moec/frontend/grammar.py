"""What a family file may say: checked once when it is loaded, so that reading never trips.

A mistake in the file of a user must be an error that names the key, not a crash later on.
Values are another matter: whether a resolved template fits the layer is judged by MoESpec.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .faults import bad_family
from .sources import SLOTS, parse_source

if TYPE_CHECKING:
    from .family import Family

_TEMPLATES = ("router", "experts", "activation", "shared", "norms", "spec")
# Conditions of a layer rule -> the further keys that each needs.
_CONDITIONS: dict[str, tuple[str, ...]] = {"types": ("moe", "other")}


def check(family: Family, maps: dict[str, dict[str, Any]]) -> None:
    """Raise BadSpec naming the first key that cannot be understood; `maps` are the shared ones."""
    where = family.source
    for name in ("family", "layer", "block", "example"):
        _need(isinstance(getattr(family, name), str), name, "a string", where)
    _need("{L}" in family.layer, "layer", "a name with {L}, the layer's number", where)
    for name in ("model_types", "prefixes", "owns", "layouts"):
        _need(len(getattr(family, name)) > 0, name, "at least one entry", where)
    kind = family.config["num_layers"].kind
    _need(kind in ("size", "length"), "config.num_layers", 'kind "size" or "length"', where)
    for name, path in family.wrappers.items():
        _need(isinstance(path, str), f"wrappers.{name}", "the key of the nested config", where)
    for name, allowed in family.require.items():
        _need(name in family.config, f"require.{name}", "an entry of [config]", where)
        _need(isinstance(allowed, list) and allowed, f"require.{name}", "a list of values", where)
    for name in _TEMPLATES:
        _template(getattr(family, name), name, family, maps)
    for number, case in enumerate(family.layers):
        _case(case, f"layers[{number}]", family, maps)
    for layout, table in family.layouts.items():
        _tensors(table, f"layout {layout}", where)
    _tensors(family.tensors, "tensors", where)


def _need(ok: Any, key: str, need: str, where: str) -> None:
    if not ok:
        raise bad_family(f"{key} is not valid", where, need)


def _tensors(table: dict[str, Any], key: str, where: str) -> None:
    for slot, source in table.items():
        _need(slot in SLOTS, f"{key}.{slot}", f"one of {', '.join(SLOTS)}", where)
        choices = source if isinstance(source, list) else [source]
        _need(choices, f"{key}.{slot}", "a source", where)
        for choice in choices:
            parse_source(choice, where)


def _template(value: Any, key: str, family: Family, maps: dict[str, dict[str, Any]]) -> None:
    if isinstance(value, str) and value.startswith("$"):
        known = value == "$layer" or value[1:] in family.config
        _need(known, f"{key} = {value!r}", "$NAME of an entry of [config]", family.source)
    elif isinstance(value, list):
        for item in value:
            _template(item, key, family, maps)
    elif isinstance(value, dict):
        for operator, well_formed in _OPERATORS.items():
            if operator in value:
                ok, need = well_formed(value, maps)
                _need(ok, f"{key}.{operator}", need, family.source)
        for name, inner in value.items():
            if name == "to" and "map" in value:  # the names in it are values, not operators
                inner = [] if isinstance(inner, str) else list(inner.values())
            _template(inner, f"{key}.{name}", family, maps)


Judge = Callable[[dict[str, Any], dict[str, dict[str, Any]]], "tuple[bool, str]"]


def _if(value: dict[str, Any], maps: dict[str, dict[str, Any]]) -> tuple[bool, str]:
    return set(value) <= {"if", "then", "else"}, "{ if, then, else }"


def _map(value: dict[str, Any], maps: dict[str, dict[str, Any]]) -> tuple[bool, str]:
    of, to = value["map"], value.get("to")
    ok = set(value) == {"map", "to"} and isinstance(of, str) and of.startswith("$")
    ok = ok and (isinstance(to, dict) or (isinstance(to, str) and to in maps))
    return ok, f'{{ map = "$NAME", to = a table or one of {", ".join(maps)} }}'


def _values(operator: str, count: int | None) -> Judge:
    def judge(value: dict[str, Any], maps: dict[str, dict[str, Any]]) -> tuple[bool, str]:
        given = value[operator]
        ok = set(value) == {operator} and isinstance(given, list) and len(given) > 0
        ok = ok and (count is None or len(given) == count)
        return ok, f"{{ {operator} = [{'two' if count else 'some'} values] }}"

    return judge


_OPERATORS: dict[str, Judge] = {
    "if": _if,
    "map": _map,
    "product": _values("product", None),
    "sum": _values("sum", None),
    "power": _values("power", 2),
    "less": _values("less", 2),
    "first": _values("first", None),
}


def _case(case: Any, key: str, family: Family, maps: dict[str, dict[str, Any]]) -> None:
    where = family.source
    _need(isinstance(case, dict) and set(case) <= {"given", "all"}, key, "given and all", where)
    given, conditions = case.get("given", []), case.get("all", [])
    ok = isinstance(given, list) and all(isinstance(n, str) and n in family.config for n in given)
    _need(ok, f"{key}.given", "names of entries of [config]", where)
    ok = isinstance(conditions, list) and all(isinstance(c, dict) for c in conditions)
    _need(ok, f"{key}.all", "a list of conditions", where)
    for condition in conditions:
        for name, further in _CONDITIONS.items():
            if name in condition:
                missing = [k for k in further if k not in condition]
                _need(not missing, f"{key}.all.{name}", " and ".join(further), where)
        _template(condition, f"{key}.all", family, maps)
