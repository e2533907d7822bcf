"""A family as data: one TOML (or JSON) file, checked field by field when it is loaded.

docs in families/README: what each key means. Nothing here knows any family by name. A file
with `like = "other"` starts from the built-in family of that name: its own keys replace those
of the other, tables key by key, and `drop` names what to leave out ("layers", "config.freq").
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import pathlib
import sys
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import BadSpec

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


def load(path: str | pathlib.Path) -> Family:
    """Read one family file, .toml or .json; raises BadSpec naming the file and the key."""
    path = pathlib.Path(path)
    data = _raw(path)
    where = path.name
    known = {f.name for f in fields(Family)} - {"source"} | {"own_layouts"}
    unknown = sorted(set(data) - known)
    if unknown:
        raise BadSpec(f"unknown key {unknown[0]!r}", where=where, need=", ".join(sorted(known)))
    missing = sorted(_missing(data))
    if missing:
        raise BadSpec(f"the key {missing[0]!r} is missing", where=where, need="see _template.toml")
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
            raise BadSpec(f"config.{name} is missing", where=where, need=", ".join(_SIZES))
    for name in data.get("require", {}):
        if name not in values["config"]:
            raise BadSpec(f"require.{name} names no field of [config]", where=where)
    values["layouts"] = _layouts(data, where)
    values.pop("own_layouts", None)
    values["layers"] = tuple(_typed(data.get("layers", []), list, "layers", where))
    return Family(**values, source=where)


def _raw(path: pathlib.Path, below: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys of a file after `like` and `drop`."""
    data = _parse(path)
    where = path.name
    like, drop = data.pop("like", None), _strings(data.pop("drop", []), "drop", where)
    if like is None:
        return data
    other = _folder() / f"{like}.toml"
    if not isinstance(like, str) or not like.isidentifier() or not other.exists():
        raise BadSpec(f"like: there is no built-in family {like!r}", where=where)
    if like in below:
        raise BadSpec(f"like: {' -> '.join((*below, like))} is a circle", where=where)
    base = _raw(other, (*below, like))
    for key in ("example", "notes", "wrappers"):  # facts about the other family alone
        base.pop(key, None)
    for name in drop:
        table, _, key = name.partition(".")
        if (key not in base.get(table, {})) if key else (table not in base):
            raise BadSpec(f"drop: {like} has no {name!r}", where=where)
        base.pop(table) if not key else base[table].pop(key)
    return _merged(base, data)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = {**out[key], **value} if both else value
    return out


def _missing(data: dict[str, Any]) -> set[str]:
    required = {"family", "model_types", "prefixes", "layer", "block", "owns"}
    return (required | {"layouts", "config", "tensors"}) - set(data)


def _layouts(data: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    own = _typed(data.get("own_layouts", {}), dict, "own_layouts", where)
    out: dict[str, dict[str, Any]] = {}
    for name in _strings(data["layouts"], "layouts", where):
        table = own.get(name, common().layouts.get(name))
        if table is None:
            raise BadSpec(
                f"there is no layout {name!r}",
                where=where,
                need=", ".join([*own, *common().layouts]),
            )
        out[name] = _typed(table, dict, f"layout {name}", where)
    return out


def _field(name: str, entry: Any, where: str) -> Field:
    entry = _typed(entry, dict, f"config.{name}", where)
    unknown = sorted(set(entry) - {"key", "kind", "default", "optional", "per_layer"})
    if unknown:
        raise BadSpec(f"config.{name}: unknown key {unknown[0]!r}", where=where)
    key = entry.get("key", name)
    keys = tuple(_strings([key] if isinstance(key, str) else key, f"config.{name}.key", where))
    kind = entry.get("kind", "size" if name in _SIZES else "")
    if kind not in _KINDS:
        raise BadSpec(f"config.{name}: unknown kind {kind!r}", where=where, need=", ".join(_KINDS))
    optional = bool(entry.get("optional", False))
    required = "default" not in entry and not optional
    per_layer = bool(entry.get("per_layer", False))
    return Field(keys, kind, entry.get("default"), optional, required, per_layer)


def _typed(value: Any, kind: type, name: str, where: str) -> Any:
    if not isinstance(value, kind):
        raise BadSpec(f"{name} is no {kind.__name__}", where=where)
    return value


def _strings(value: Any, name: str, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise BadSpec(f"{name} is no list of strings", where=where)
    return value


def _parse(path: pathlib.Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FAMILY_FILE:
            raise BadSpec("the family file is too large", where=str(path), need="at most 1 MiB")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadSpec(f"the family file cannot be read: {error}", where=str(path)) from None
    try:
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSpec(
            f"the family file is not well formed: {error}", where=str(path), need="TOML or JSON"
        ) from None
    if not isinstance(data, dict):
        raise BadSpec("the family file is no table", where=str(path), need="TOML or JSON")
    return data
