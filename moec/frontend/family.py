"""A family as data: one TOML (or JSON) file, checked field by field when it is loaded.

families/_template.toml says what each key means. Nothing here knows any family by name. A file
with `like = "other"` starts from the built-in family of that name: its own keys replace those
of the other, tables key by key, and `drop` names what to leave out ("layers", "config.freq").
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import os
import pathlib
import sys
from dataclasses import dataclass, field, fields
from typing import Any

from . import grammar
from .faults import bad_family

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_FAMILY_FILE = 1 << 20


@dataclass(frozen=True)
class Field:
    """One config entry that a family reads: names in config.json, type, value when absent.

    `keys` are alternative names, which must agree when several are present. `kind` is one of
    size (>= 1), count (>= 0), integer, number, flag, text, ints, texts, or length (an integer,
    or the length of a list or string). A field without default is required unless `optional`,
    which gives None for an absent or null field. A key may be a path, "ffn_config.moe_top_k".
    With `per_layer` a list with one value for every layer may stand in place of one value.
    """

    keys: tuple[str, ...]
    kind: str
    default: Any = None
    optional: bool = False
    required: bool = False
    per_layer: bool = False


@dataclass(frozen=True)
class Family:
    """One row of the table; see families/_template.toml for every key with its meaning."""

    family: str
    model_types: tuple[str, ...]
    prefixes: tuple[str, ...]
    layer: str
    block: str
    owns: tuple[str, ...]
    layouts: dict[str, dict[str, Any]]
    config: dict[str, Field]
    tensors: dict[str, Any]
    layers: tuple[dict[str, Any], ...] = ()
    wrappers: dict[str, str] = field(default_factory=dict)
    require: dict[str, list[Any]] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    router: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)
    activation: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    norms: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    spare: tuple[str, ...] = ()  # names that may exist without meaning; {z}: of zero experts
    example: str = ""
    notes: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Common:
    """What families share: layouts, word lists, and model types refused by name."""

    layouts: dict[str, dict[str, Any]]
    maps: dict[str, dict[str, Any]]
    ignore: tuple[str, ...]
    looks_like_moe: tuple[str, ...]
    refused: dict[str, str]


_KINDS = ("size", "count", "integer", "number", "flag", "text", "ints", "texts", "length")
_SIZES = ("num_layers", "hidden_size", "intermediate_size", "num_experts", "top_k")
_TUPLES = ("model_types", "prefixes", "owns", "ignore", "spare", "notes")
_NAMES: dict[Any, str] = {dict: "table", list: "list"}
_REQUIRED = (
    "family", "model_types", "prefixes", "layer", "block", "owns", "layouts", "config", "tensors",
)  # fmt: skip
_TABLES = (
    "wrappers", "require", "router", "experts", "activation", "shared", "norms", "spec",
    "tensors",
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def common() -> Common:
    """The shared table, families/_common.toml."""
    return Common(**_common_fields(_parse(_folder() / "_common.toml")))


def _common_fields(data: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}


@functools.lru_cache(maxsize=1)
def builtin() -> tuple[Family, ...]:
    """Every family that comes with moec, in the order of their names."""
    files = sorted(p.name for p in _folder().iterdir() if p.name.endswith(".toml"))
    return tuple(load(_folder() / name) for name in files if not name.startswith("_"))


def _folder() -> pathlib.Path:
    return pathlib.Path(str(importlib.resources.files(__package__) / "families"))


def load(path: str | os.PathLike[str]) -> Family:
    """Read one family file, .toml or .json; raises BadSpec naming the file and the key."""
    path = pathlib.Path(path)
    data = _raw(path)
    where = path.name
    known = {f.name for f in fields(Family)} - {"source"} | {"own_layouts"}
    unknown = sorted(set(data) - known)
    if unknown:
        raise bad_family(f"unknown key {unknown[0]!r}", where, ", ".join(sorted(known)))
    missing = [name for name in _REQUIRED if name not in data]
    if missing:
        raise bad_family(f"the key {missing[0]!r} is missing", where, ", ".join(_REQUIRED))
    for name in _TABLES:
        _typed(data.get(name, {}), dict, name, where)
    values: dict[str, Any] = dict(data)
    for name in _TUPLES:
        values[name] = tuple(_strings(data.get(name, []), name, where))
    values["config"] = {
        name: _field(name, entry, where)
        for name, entry in _typed(data["config"], dict, "config", where).items()
    }
    for name in _SIZES:
        if name not in values["config"]:
            raise bad_family(f"config.{name} is missing", where, ", ".join(_SIZES))
    values["layouts"] = _layouts(data, where)
    values.pop("own_layouts", None)
    values["layers"] = tuple(_typed(data.get("layers", []), list, "layers", where))
    family = Family(**values, source=where)
    grammar.check(family, common().maps)
    return family


def _raw(path: pathlib.Path, below: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys of a file after `like` and `drop`."""
    data = _parse(path)
    where = path.name
    like, drop = data.pop("like", None), _strings(data.pop("drop", []), "drop", where)
    if like is None and not drop:
        return data
    names = [p.stem for p in _folder().glob("[!_]*.toml")]
    if like not in names:
        raise bad_family(f"like: there is no built-in family {like!r}", where, ", ".join(names))
    if like in below:
        raise bad_family(f"like: {' -> '.join((*below, like))}", where, "no circle")
    base = _raw(_folder() / f"{like}.toml", (*below, like))
    for key in ("example", "notes", "wrappers"):  # facts about the other family alone
        base.pop(key, None)
    for name in drop:
        table, _, key = name.partition(".")
        if (key not in base.get(table, {})) if key else (table not in base):
            raise bad_family(f"drop: {like} has no {name!r}", where, "keys of the other family")
        if key:
            base[table].pop(key)
        else:
            base.pop(table)
    return _merged(base, data)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = {**out[key], **value} if both else value
    return out


def _layouts(data: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    own = _typed(data.get("own_layouts", {}), dict, "own_layouts", where)
    out: dict[str, dict[str, Any]] = {}
    for name in _strings(data["layouts"], "layouts", where):
        table = own.get(name, common().layouts.get(name))
        if table is None:
            raise bad_family(
                f"there is no layout {name!r}", where, ", ".join([*own, *common().layouts])
            )
        out[name] = _typed(table, dict, f"layout {name}", where)
    return out


def _field(name: str, entry: Any, where: str) -> Field:
    entry = _typed(entry, dict, f"config.{name}", where)
    known = ("key", "kind", "default", "optional", "per_layer")
    unknown = sorted(set(entry) - set(known))
    if unknown:
        raise bad_family(f"config.{name}: unknown key {unknown[0]!r}", where, ", ".join(known))
    key = entry.get("key", name)
    keys = tuple(_strings([key] if isinstance(key, str) else key, f"config.{name}.key", where))
    kind = entry.get("kind", "size" if name in _SIZES else "")
    if kind not in _KINDS:
        raise bad_family(f"config.{name}: unknown kind {kind!r}", where, ", ".join(_KINDS))
    optional = bool(entry.get("optional", False))
    required = "default" not in entry and not optional
    per_layer = bool(entry.get("per_layer", False))
    return Field(keys, kind, entry.get("default"), optional, required, per_layer)


def _typed(value: Any, kind: type, name: str, where: str) -> Any:
    if not isinstance(value, kind):
        raise bad_family(f"{name} is no {_NAMES[kind]}", where, f"a {_NAMES[kind]}")
    return value


def _strings(value: Any, name: str, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise bad_family(f"{name} is no list of strings", where, "a list of strings")
    return value


def _parse(path: pathlib.Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FAMILY_FILE:
            raise bad_family("the family file is too large", str(path), "at most 1 MiB")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise bad_family(
            f"the family file cannot be read: {error}", str(path), "a readable file in UTF-8"
        ) from None
    try:
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad_family(
            f"the family file is not well formed: {error}", str(path), "TOML or JSON"
        ) from None
    if not isinstance(data, dict):
        raise bad_family("the family file is no table", str(path), "TOML or JSON")
    return data
