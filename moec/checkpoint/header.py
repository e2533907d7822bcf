"""The safetensors header: parsed and judged completely before any offset in it is used."""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import BadCheckpoint
from .files import Identity, opened, read_exactly
from .strict import parse_object

MAX_HEADER = 100_000_000  # the limit of the format's own reader
MAX_TENSORS = 1_000_000
MAX_RANK = 8
MAX_ELEMENTS = 1 << 48
MAX_NAME = 1024

# Name in the file -> (bits an element, NumPy dtype or None where NumPy has no such array).
DTYPES: dict[str, tuple[int, np.dtype[Any] | None]] = {
    "BOOL": (8, np.dtype(np.bool_)),
    "U8": (8, np.dtype(np.uint8)),
    "I8": (8, np.dtype(np.int8)),
    "U16": (16, np.dtype("<u2")),
    "I16": (16, np.dtype("<i2")),
    "U32": (32, np.dtype("<u4")),
    "I32": (32, np.dtype("<i4")),
    "U64": (64, np.dtype("<u8")),
    "I64": (64, np.dtype("<i8")),
    "F16": (16, np.dtype("<f2")),
    "BF16": (16, np.dtype(ml_dtypes.bfloat16)),
    "F32": (32, np.dtype("<f4")),
    "F64": (64, np.dtype("<f8")),
    "F8_E4M3": (8, np.dtype(ml_dtypes.float8_e4m3fn)),
    "F8_E5M2": (8, np.dtype(ml_dtypes.float8_e5m2)),
    "F8_E8M0": (8, np.dtype(ml_dtypes.float8_e8m0fnu)),
    "C64": (64, np.dtype("<c8")),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
}
# Names of the dtypes that NumPy cannot hold, for messages and headers.
_PACKED = {"F4": "float4_e2m1fn", "F6_E2M3": "float6_e2m3fn", "F6_E3M2": "float6_e3m2fn"}


def dtype_name(code: str) -> str:
    """`bfloat16` for `BF16`: the name that the whole project uses."""
    dtype = DTYPES[code][1]
    return dtype.name if dtype is not None else _PACKED[code]


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard; `begin` is counted from the start of the file."""

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    size: int


@dataclass(frozen=True)
class Header:
    """All tensors of one shard, in file order, and the identity of the file they are in."""

    entries: tuple[Entry, ...]
    identity: Identity


def read_header(path: pathlib.Path, where: str) -> Header:
    """Parse and check the header of the shard at the resolved `path`.

    Everything that the format forbids is refused (holes, overlap, trailing or missing bytes,
    wrong sizes), and so is what it leaves open and no honest writer produces: equal duplicate
    keys, unknown fields, control characters in names, absurd dimensions.
    """
    with opened(path, where) as (fd, status):
        return Header(tuple(_entries(fd, status, where)), Identity.of(status))


def _entries(fd: int, status: os.stat_result, where: str) -> list[Entry]:
    size = status.st_size
    if size < 10:
        raise _bad(f"{size} bytes are no safetensors file", where)
    length = int.from_bytes(read_exactly(fd, 8, 0, where), "little")
    if length > MAX_HEADER or length > size - 8:
        raise _bad(
            f"the header claims {length} bytes of a file of {size}", where, "a complete file"
        )
    raw = read_exactly(fd, length, 8, where)
    if raw[:1] != b"{":
        raise _bad("the header does not start with '{'", where)
    table = parse_object(raw, f"{where} (header)", nonfinite=False)
    _metadata(table.pop("__metadata__", {}), where)
    if len(table) > MAX_TENSORS:
        raise _bad(f"{len(table)} tensors in one file", where, f"at most {MAX_TENSORS}")
    entries = [_entry(name, value, where, 8 + length) for name, value in table.items()]
    entries.sort(key=lambda e: (e.begin, e.size))
    end = 8 + length
    for entry in entries:
        if entry.begin != end:
            kind = "overlaps the tensor before it" if entry.begin < end else "leaves a hole"
            raise _bad(f"tensor {entry.name!r} {kind}", where, "tensors that fill the file")
        end += entry.size
    if end != size:
        kind = "is truncated" if end > size else "has bytes after the last tensor"
        raise _bad(f"the file {kind}: {size} bytes, {end} described", where, f"{end} bytes")
    return entries


def _metadata(value: Any, where: str) -> None:
    ok = isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    if not ok:
        raise _bad("__metadata__ is not a map of strings", where)


def _entry(name: str, value: Any, where: str, start: int) -> Entry:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise _bad(f"{name[:60]!r} is no tensor name", where, "1 to 1024 printable characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _bad(f"tensor {name!r} is not described by dtype, shape, data_offsets", where)
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise _bad(f"tensor {name!r} has the unknown dtype {code!r}", where, ", ".join(DTYPES))
    if not _naturals(shape) or len(shape) > MAX_RANK:
        raise _bad(f"tensor {name!r} has the shape {shape!r}", where, f"at most {MAX_RANK} sizes")
    elements, extent = 1, 1
    for dim in shape:
        elements *= dim
        extent *= max(dim, 1)  # a zero elsewhere must not hide an absurd dimension
        if extent > MAX_ELEMENTS:
            raise _bad(f"tensor {name!r} has the absurd shape {shape!r}", where)
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(f"tensor {name!r} has the data_offsets {offsets!r}", where, "[begin, end]")
    bits = elements * DTYPES[code][0]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise _bad(
            f"tensor {name!r}, {code} {shape}, does not fit {offsets[1] - offsets[0]} bytes",
            where,
            f"{(bits + 7) // 8} bytes",
        )
    return Entry(name, code, tuple(shape), start + offsets[0], bits // 8)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _bad(message: str, where: str, need: str | None = None) -> BadCheckpoint:
    return BadCheckpoint(
        message,
        where=where,
        need=need or "a safetensors file",
        hint="download the file again, or write it again with safetensors",
    )
