"""Weight files: safetensors whose data start at a page and whose tensors start at 64 bytes.

The writer streams: the layout is declared first, then bytes arrive in that order in pieces
of any size, and the sha256 is computed on the way. The format allows no holes, so bytes
between tensors belong to explicit uint8 tensors "pad.N". The reader checks the header
against the file before anything is mapped.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArtifactError
from . import disk

ALIGNMENT = 64
PAGE = 4096
MAX_HEADER = 100_000_000  # the limit of the safetensors library
PAD_PREFIX = "pad."
# What is written at once, at a multiple of itself. Linux keeps a file in the page cache in pages as
# large as the pieces in which it was written: of this size, a huge page of most machines.
BLOCK = 2 << 20

_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def itemsize(dtype: str) -> int:
    """Bytes of one element of a dtype that a weight file may hold."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


@dataclass(frozen=True)
class Entry:
    """One tensor: `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        return prod(self.shape) * itemsize(self.dtype)


def plan(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[Entry]]:
    """Header bytes and entries (pads included, in file order) for (name, dtype, shape) triples."""
    header: dict[str, Any] = {}
    rows: list[tuple[str, str, tuple[int, ...], int]] = []
    end = 0
    for name, dtype, shape in tensors:
        if name in header or name.startswith(PAD_PREFIX):
            raise ValueError(f"tensor name {name!r} is taken")
        size = prod(shape) * itemsize(dtype)
        pad = f"{PAD_PREFIX}{len(rows)}"
        for key, kind, dims, length in (
            (name, dtype, shape, size),
            (pad, "uint8", (-size % ALIGNMENT,), -size % ALIGNMENT),
        ):
            if length or key == name:
                span = [end, end + length]
                header[key] = {"dtype": _NAMES[kind], "shape": list(dims), "data_offsets": span}
                rows.append((key, kind, dims, end))
                end += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    start = 8 + len(text)
    entries = [Entry(name, dtype, shape, start + at) for name, dtype, shape, at in rows]
    return struct.pack("<Q", len(text)) + text, entries


class TensorFileWriter:
    """Writes one weight file front to back; `write` takes the next bytes of a named tensor."""

    def __init__(
        self, file: Any, tensors: Sequence[tuple[str, str, tuple[int, ...]]], path: Path
    ) -> None:
        header, self._entries = plan(tensors)
        self._path = path  # what an error is about
        self._file = file
        self._hash = hashlib.sha256()
        # Hashing runs beside writing, as both release the interpreter lock.
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._index, self._left = -1, 0
        self._block = bytearray()  # what is not written yet, less than BLOCK
        self.bytes = 0
        self._put(memoryview(header))
        self._next()

    def write(self, name: str, data: np.ndarray[Any, Any]) -> None:
        """Append `data` (C-contiguous) to tensor `name`, which must be the one in turn."""
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        if self._index >= len(self._entries) or self._entries[self._index].name != name:
            raise ValueError(f"tensor {name!r} is not the next one of the layout")
        if len(view) > self._left:
            raise ValueError(f"tensor {name!r} overflows by {len(view) - self._left} bytes")
        self._put(view)
        self._left -= len(view)
        if not self._left:
            self._next()

    def finish(self) -> str:
        """Check that every tensor is complete and return the file's sha256."""
        self._pool.shutdown()
        if self._index < len(self._entries):
            raise ValueError(f"tensor {self._entries[self._index].name!r} is incomplete")
        with disk.errors(self._path):
            self._file.write(self._block)
        self._block = bytearray()
        return self._hash.hexdigest()

    def _put(self, view: memoryview) -> None:
        hashed = self._pool.submit(self._hash.update, view)
        try:
            with disk.errors(self._path):
                self._write_blocks(view)
        finally:
            hashed.result()
        self.bytes += len(view)

    def _write_blocks(self, view: memoryview) -> None:
        """Write whole blocks, and keep the rest for later."""
        start = -len(self._block) % BLOCK
        self._block += view[:start]
        if len(self._block) == BLOCK:
            self._file.write(self._block)
            self._block = bytearray()
        if not self._block:
            end = start + (len(view) - start) // BLOCK * BLOCK
            if end > start:
                self._file.write(view[start:end])
            self._block += view[end:]

    def _next(self) -> None:
        """Go to the next tensor that takes bytes, filling pads."""
        self._index += 1
        while self._index < len(self._entries):
            entry = self._entries[self._index]
            if entry.name.startswith(PAD_PREFIX):
                self._put(memoryview(bytes(entry.bytes)))
            elif entry.bytes:
                self._left = entry.bytes
                return
            self._index += 1


def read_entries(path: Path) -> dict[str, Entry]:
    """The tensors of a weight file that this module wrote; ArtifactError for any other file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise _damaged(path, f"its header claims {length} bytes")
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    try:
        entries = [_entry(name, value, 8 + length) for name, value in header.items()]
    except (TypeError, ValueError, KeyError, AttributeError, LookupError) as error:
        raise _damaged(path, f"its header is malformed ({error})") from None
    at = 8 + length
    for entry in entries:
        crooked = entry.offset % ALIGNMENT and not entry.name.startswith(PAD_PREFIX)
        if entry.offset != at or crooked:
            raise _damaged(path, f"tensor {entry.name!r} is at byte {entry.offset}")
        at += entry.bytes
    if at != size or (8 + length) % PAGE:
        raise _damaged(path, f"it holds {size} bytes, its header describes {at}")
    return {e.name: e for e in entries if not e.name.startswith(PAD_PREFIX)}


def _entry(name: str, value: dict[str, Any], start: int) -> Entry:
    shape = tuple(value["shape"])
    begin, end = value["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"tensor {name!r} has a number that is not a size")
    entry = Entry(name, _DTYPES[value["dtype"]], shape, start + begin)
    if end - begin != entry.bytes:
        raise ValueError(f"tensor {name!r} spans {end - begin} bytes, its shape {entry.bytes}")
    return entry


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"weight file {path.name} is damaged: {why}",
        where=str(path),
        need="a safetensors file as moec writes it",
        hint="compile the artifact again, or copy it again from where it was whole",
    )
