"""Safetensors files byte by byte, for what the library would refuse to write."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

Entry = dict[str, Any]


def entry(dtype: str, shape: list[int], begin: int, end: int, **more: Any) -> Entry:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def pack(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header (as it is when bytes); `length` is what it claims to be."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a valid file."""
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def edit(path: Path, change: Any) -> None:
    """Let `change` work on the header of a file in place; the data stays."""
    header, data = split(path.read_bytes())
    change(header)
    path.write_bytes(pack(header, data))


def directory(path: Path, file: bytes, config: str = "{}") -> Path:
    """A model directory with this single file."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(file)
    return path


def f32(*shape: int) -> np.ndarray:
    """Numbered float32 elements."""
    return np.arange(np.prod(shape), dtype="f4").reshape(shape)
