"""The manifest: canonical JSON (sorted keys, UTF-8, LF, indent 1) and its typed form.

`encode` gives the only accepted bytes for a document and puts its digest in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..spec import MoESpec, Parameter

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
MAX_BYTES = 256 << 20
TOKENS = "T"  # the symbolic dimension of inputs and outputs


@dataclass(frozen=True)
class TensorType:
    """An input or output: `shape` holds integers and the symbol "T"."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class Packed:
    """A parameter as the compiled functions take it; `symbol` packs it (None: copied as is)."""

    shape: tuple[int, ...]
    dtype: str
    source: str
    symbol: str | None
    per_expert: bool


@dataclass(frozen=True)
class Variant:
    """One compiled symbol; `tokens` is the range [lo, hi) it is chosen for, None = by name only."""

    symbol: str
    schedule: str
    tokens: tuple[int, int | None] | None
    workspace: tuple[int, int]
    deterministic: bool
    ops: Mapping[str, Any]


@dataclass(frozen=True)
class Function:
    """route, experts or moe: symbol(*inputs, *parameters, *outputs, workspace, num_threads)."""

    inputs: tuple[TensorType, ...]
    parameters: tuple[str, ...]
    outputs: tuple[TensorType, ...]
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class TargetShape:
    """What a library holds for one block shape."""

    packed: Mapping[str, Packed]
    functions: Mapping[str, Function]


@dataclass(frozen=True)
class Target:
    """One compiled library and the machine that it needs."""

    library: str
    device: str
    requires: Mapping[str, Any]
    shapes: Mapping[str, TargetShape]


@dataclass(frozen=True)
class Shape:
    """A distinct block: several layers may share it."""

    spec: MoESpec
    parameters: Mapping[str, Parameter]


@dataclass(frozen=True)
class Block:
    """One layer: its shape, its packed weights and where they came from (a weight plan)."""

    layer: int
    shape: str
    weights: str | None
    plan: Mapping[str, Any] | None


@dataclass(frozen=True)
class Weights:
    """`mode` "pack": stored for `target`; "reference": packed from the checkpoint at load."""

    mode: str
    target: str | None


@dataclass(frozen=True)
class FileEntry:
    """Hash and size of one file of the artifact."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """All that a reader needs to know about an artifact."""

    producer: Mapping[str, str]
    source: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    blocks: tuple[Block, ...]
    targets: Mapping[str, Target]
    weights: Weights
    files: Mapping[str, FileEntry]
    digest: str


def encode(document: Mapping[str, Any]) -> tuple[bytes, str]:
    """The canonical bytes of a manifest, with its digest put in, and the digest."""
    body = {key: value for key, value in document.items() if key != "digest"}
    digest = hashlib.sha256(_canonical(body)).hexdigest()
    return _canonical({**body, "digest": digest}), digest


def _canonical(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"
