"""From manifest bytes to a Manifest: nothing that the runtime relies on goes unchecked.

Only canonical bytes with the right digest are taken; ArtifactError names the path of the
first field that is wrong. Unknown keys are allowed (later versions add optional ones), a
newer `format_version` is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from ..errors import ArtifactError, BadSpec
from ..spec import MoESpec, Parameter
from .manifest import (
    FORMAT_VERSION,
    MANIFEST,
    TOKENS,
    Block,
    FileEntry,
    Function,
    Manifest,
    Packed,
    Shape,
    Target,
    TargetShape,
    TensorType,
    Variant,
    Weights,
    encode,
)
from .tensorfile import itemsize

_T = TypeVar("_T")
_SHA = re.compile("[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def parse(data: bytes) -> Manifest:
    """The manifest in `data`; raises ArtifactError unless it is canonical and consistent."""
    try:
        document = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
        if not isinstance(document, dict):
            _refuse("manifest", "it is not an object")
        version = document.get("format_version")
        if document.get("format") != "moec":
            _refuse("format", f"{document.get('format')!r} is not 'moec'")
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"the artifact has format version {version!r}",
                where=MANIFEST,
                need=f"format version {FORMAT_VERSION}",
                hint="use the version of moec that wrote it, or compile again",
            )
        canonical, digest = encode(document)
    except (ValueError, RecursionError, UnicodeError) as error:
        _refuse("manifest", f"it is not valid JSON ({error})")
    if document.get("digest") != digest:
        _refuse("digest", f"{document.get('digest')!r} is not the document's, which is {digest}")
    if canonical != data:
        _refuse("manifest", "its bytes are not canonical (sorted keys, UTF-8, LF, indent 1)")
    manifest = _manifest(document)
    _check_links(manifest)
    return manifest


def check_name(name: str, path: str = "files") -> None:
    """Raise ArtifactError unless `name` is a plain relative path inside the artifact."""
    parts = name.split("/")
    plain = all(_NAME.fullmatch(part) for part in parts) and len(parts) <= 8
    if not plain or name == MANIFEST:
        _refuse(path, f"{name!r} is not a plain relative path inside the artifact")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _refuse(path: str, why: str) -> NoReturn:
    raise ArtifactError(
        f"the manifest is damaged: {path}: {why}",
        where=MANIFEST,
        need="a manifest as moec writes it",
        hint="compile the artifact again, or copy it again from where it was whole",
    )


class _Node:
    """A JSON object with its path, whose accessors refuse a missing or mistyped field."""

    def __init__(self, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            _refuse(path, "it is not an object")
        self.value: dict[str, Any] = value
        self.path = path

    def get(self, key: str, kind: type[_T]) -> _T:
        here = f"{self.path}.{key}" if self.path else key
        if key not in self.value:
            _refuse(here, "it is missing")
        value = self.value[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            _refuse(here, f"{value!r} is not of type {kind.__name__}")
        return value

    def optional(self, key: str, kind: type[_T]) -> _T | None:
        return None if self.value.get(key) is None else self.get(key, kind)

    def size(self, key: str) -> int:
        value = self.get(key, int)
        if value < 0:
            _refuse(f"{self.path}.{key}", f"{value} is negative")
        return value

    def table(self, key: str, make: Callable[[_Node], _T]) -> dict[str, _T]:
        inner = self.get(key, dict)
        return {k: make(_Node(v, f"{self.path}.{key}.{k}".lstrip("."))) for k, v in inner.items()}

    def rows(self, key: str, make: Callable[[_Node], _T]) -> tuple[_T, ...]:
        inner = self.get(key, list)
        return tuple(make(_Node(v, f"{self.path}.{key}[{i}]")) for i, v in enumerate(inner))

    def dims(self, key: str) -> tuple[int, ...]:
        return tuple(_dim(d, f"{self.path}.{key}") for d in self.get(key, list))

    def types(self, key: str) -> tuple[TensorType, ...]:
        rows = []
        for i, row in enumerate(self.get(key, list)):
            here = f"{self.path}.{key}[{i}]"
            if not (isinstance(row, list) and len(row) == 3 and isinstance(row[1], list)):
                _refuse(here, "it is not [name, shape, dtype]")
            name, shape, dtype = row
            dims = tuple(d if d == TOKENS else _dim(d, here) for d in shape)
            if not isinstance(name, str) or not dims or TOKENS in dims[1:]:
                _refuse(here, f"{row!r} is not a named tensor")
            rows.append(TensorType(name, dims, _dtype(dtype, here)))
        return tuple(rows)


def _dim(value: Any, path: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        _refuse(path, f"{value!r} is not a dimension")
    return value


def _dtype(value: Any, path: str) -> str:
    try:
        itemsize(value)
    except TypeError:
        _refuse(path, f"{value!r} is not a dtype")
    return str(value)


def _manifest(document: dict[str, Any]) -> Manifest:
    root = _Node(document, "")
    producer = root.get("producer", dict)
    for key in ("moec", "tvm", "tvm_ffi"):
        _Node(producer, "producer").get(key, str)
    weights = _Node(root.get("weights", dict), "weights")
    return Manifest(
        producer=producer,
        source=root.get("source", dict),
        shapes=root.table("shapes", _shape),
        blocks=root.rows("blocks", _block),
        targets=root.table("targets", _target),
        weights=Weights(weights.get("mode", str), weights.optional("target", str)),
        files=root.table("files", _file),
        digest=root.get("digest", str),
    )


def _shape(node: _Node) -> Shape:
    try:
        spec = MoESpec.from_json(node.get("spec", dict))
    except (BadSpec, TypeError, ValueError) as error:
        _refuse(f"{node.path}.spec", getattr(error, "message", str(error)))
    parameters = node.table(
        "parameters", lambda n: Parameter(n.dims("shape"), _dtype(n.get("dtype", str), n.path))
    )
    if parameters != spec.parameters():
        _refuse(f"{node.path}.parameters", "they are not those that the spec asks for")
    return Shape(spec, parameters)


def _block(node: _Node) -> Block:
    return Block(
        layer=node.size("layer"),
        shape=node.get("shape", str),
        weights=node.optional("weights", str),
        plan=node.optional("plan", dict),
    )


def _target(node: _Node) -> Target:
    return Target(
        library=node.get("library", str),
        device=node.get("device", str),
        requires=_requires(_Node(node.get("requires", dict), f"{node.path}.requires")),
        shapes=node.table("shapes", _target_shape),
    )


def _requires(node: _Node) -> dict[str, Any]:
    if not all(isinstance(f, str) for f in node.optional("features", list) or ()):
        _refuse(f"{node.path}.features", "it is not a list of names")
    return node.value


def _target_shape(node: _Node) -> TargetShape:
    return TargetShape(node.table("packed", _packed), node.table("functions", _function))


def _packed(node: _Node) -> Packed:
    return Packed(
        shape=node.dims("shape"),
        dtype=_dtype(node.get("dtype", str), node.path),
        source=node.get("source", str),
        symbol=node.optional("symbol", str),
        per_expert=node.get("per_expert", bool),
    )


def _function(node: _Node) -> Function:
    names = node.get("parameters", list)
    if not all(isinstance(name, str) for name in names):
        _refuse(f"{node.path}.parameters", "it is not a list of names")
    variants = node.rows("variants", _variant)
    if not variants:
        _refuse(f"{node.path}.variants", "there is none")
    return Function(node.types("inputs"), tuple(names), node.types("outputs"), variants)


def _variant(node: _Node) -> Variant:
    workspace = node.dims("workspace")
    if len(workspace) != 2:
        _refuse(f"{node.path}.workspace", "it is not [fixed bytes, bytes per token]")
    return Variant(
        symbol=node.get("symbol", str),
        schedule=node.get("schedule", str),
        tokens=_range(node.optional("tokens", list), f"{node.path}.tokens"),
        workspace=(workspace[0], workspace[1]),
        deterministic=node.get("deterministic", bool),
        ops=node.get("ops", dict),
    )


def _range(value: list[Any] | None, path: str) -> tuple[int, int | None] | None:
    if value is None:
        return None
    if len(value) != 2:
        _refuse(path, f"{value!r} is not [lo, hi)")
    low = _dim(value[0], path)
    high = None if value[1] is None else _dim(value[1], path)
    if high is not None and high <= low:
        _refuse(path, f"[{low}, {high}) is empty")
    return low, high


def _file(node: _Node) -> FileEntry:
    sha = node.get("sha256", str)
    if not _SHA.fullmatch(sha):
        _refuse(f"{node.path}.sha256", f"{sha!r} is not a sha256")
    return FileEntry(sha, node.size("bytes"))


def _check_links(m: Manifest) -> None:
    """What one part of the manifest says about another must hold."""
    for name in m.files:
        check_name(name)
    layers = [block.layer for block in m.blocks]
    if layers != sorted(set(layers)):
        _refuse("blocks", "layers are not in ascending order, each once")
    if m.weights.mode not in ("pack", "reference"):
        _refuse("weights.mode", f"{m.weights.mode!r} is neither 'pack' nor 'reference'")
    packing = m.weights.mode == "pack"
    if packing and m.weights.target not in m.targets:
        _refuse("weights.target", f"{m.weights.target!r} is not a target of this artifact")
    _check_blocks(m, packing)
    _check_targets(m)


def _check_blocks(m: Manifest, packing: bool) -> None:
    for block in m.blocks:
        here = f"blocks[layer {block.layer}]"
        if block.shape not in m.shapes:
            _refuse(here, f"there is no shape {block.shape!r}")
        if packing and block.weights not in m.files:
            _refuse(here, f"its weight file {block.weights!r} is not in files")
        if not packing and block.plan is None:
            _refuse(here, "it has neither weights nor a plan")


def _check_targets(m: Manifest) -> None:
    for name, target in m.targets.items():
        if target.library not in m.files:
            _refuse(f"targets.{name}", f"its library {target.library!r} is not in files")
        if set(target.shapes) != set(m.shapes):
            _refuse(f"targets.{name}.shapes", "they are not the shapes of the artifact")
        for key, shape in target.shapes.items():
            _check_parameters(m.shapes[key], shape, f"targets.{name}.shapes.{key}")


def _check_parameters(shape: Shape, compiled: TargetShape, path: str) -> None:
    experts = shape.spec.experts.num_experts
    for name, packed in compiled.packed.items():
        here = f"{path}.packed.{name}"
        if packed.source not in shape.parameters:
            _refuse(here, f"its source {packed.source!r} is not a parameter of the block")
        if packed.per_expert and packed.shape[:1] != (experts,):
            _refuse(here, f"its shape {list(packed.shape)} does not start with {experts} experts")
    for key, function in compiled.functions.items():
        for name in function.parameters:
            if name not in compiled.packed:
                _refuse(f"{path}.functions.{key}", f"it takes {name!r}, which is not in packed")
