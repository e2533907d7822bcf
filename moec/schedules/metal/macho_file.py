"""Read a 64-bit arm64 Mach-O file: symbols, linked libraries, system version, code signature.

Layouts are those of <mach-o/loader.h>, <mach-o/nlist.h> and the code-signing blobs of XNU
(cs_blobs.h). Everything raises ValueError for a file that is something else.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_MAGIC, _ARM64 = 0xFEEDFACF, 0x0100000C
_SYMTAB, _LOAD_DYLIB, _ID_DYLIB, _SIGNATURE, _BUILD_VERSION = 0x2, 0xC, 0xD, 0x1D, 0x32
_EXTERNAL, _TYPE, _STAB = 0x01, 0x0E, 0xE0
_WEAK_REF, _WEAK_DEF = 0x40, 0x80
_SUPERBLOB, _CODE_DIRECTORY = 0xFADE0CC0, 0xFADE0C02
_ADHOC = 0x2


@dataclass(frozen=True)
class Symbol:
    """An external symbol: `place` is the offset of its entry in the file."""

    name: str
    defined: bool
    weak: bool
    place: int


@dataclass(frozen=True)
class MachO:
    """What a file says about itself; `kind` is 1 for an object, 6 for a dylib."""

    kind: int
    symbols: tuple[Symbol, ...]
    libraries: tuple[str, ...]
    install_name: str | None
    minimum_os: str | None
    signature: str | None  # None: unsigned; "": valid and ad hoc; else what is wrong with it


def read(data: bytes) -> MachO:
    """Read a Mach-O file."""
    if len(data) < 32:
        raise ValueError("too short for a Mach-O file")
    magic, cpu, _, kind = struct.unpack_from("<4I", data)
    if (magic, cpu) != (_MAGIC, _ARM64):
        raise ValueError("not a Mach-O file for arm64")
    symbols: tuple[Symbol, ...] = ()
    libraries: list[str] = []
    name = minimum = signature = None
    for command, at in _commands(data):
        if command == _SYMTAB:
            symbols = tuple(_symbols(data, at))
        elif command == _LOAD_DYLIB:
            libraries.append(_dylib(data, at))
        elif command == _ID_DYLIB:
            name = _dylib(data, at)
        elif command == _BUILD_VERSION:
            version = struct.unpack_from("<I", data, at + 12)[0]
            minimum = f"{version >> 16}.{version >> 8 & 255}"
        elif command == _SIGNATURE:
            signature = _signature(data, struct.unpack_from("<I", data, at + 8)[0])
    return MachO(kind, symbols, tuple(libraries), name, minimum, signature)


def without_weak_definitions(data: bytes) -> bytes:
    """The same file, in which no defined symbol is weak.

    TVM emits the context pointer of a library as a weak symbol. Between two libraries of one
    process dyld may merge weak symbols, and the second would then look for its kernels in the
    first one's module.
    """
    changed = bytearray(data)
    for symbol in read(data).symbols:
        if symbol.defined and symbol.weak:
            flags = struct.unpack_from("<H", data, symbol.place + 6)[0]
            struct.pack_into("<H", changed, symbol.place + 6, flags & ~_WEAK_DEF)
    return bytes(changed)


def _commands(data: bytes) -> Iterator[tuple[int, int]]:
    count, at = struct.unpack_from("<I", data, 16)[0], 32
    for _ in range(count):
        command, size = struct.unpack_from("<2I", data, at)
        if size < 8 or at + size > len(data):
            raise ValueError("a load command goes past the end")
        yield command, at
        at += size


def _symbols(data: bytes, at: int) -> Iterator[Symbol]:
    table, count, strings, _ = struct.unpack_from("<4I", data, at + 8)
    for i in range(count):
        place = table + 16 * i
        name, kind, _, flags, _ = struct.unpack_from("<IBBHQ", data, place)
        if kind & _STAB or not kind & _EXTERNAL:
            continue
        start = strings + name
        text = data[start : data.index(b"\0", start)].decode()
        defined = kind & _TYPE != 0
        yield Symbol(text, defined, bool(flags & (_WEAK_DEF if defined else _WEAK_REF)), place)


def _dylib(data: bytes, at: int) -> str:
    start = at + int(struct.unpack_from("<I", data, at + 8)[0])
    return data[start : data.index(b"\0", start)].decode()


def _signature(data: bytes, start: int) -> str:
    magic, _, count = struct.unpack_from(">3I", data, start)
    if magic != _SUPERBLOB:
        return "the signature is no superblob"
    for i in range(count):
        at = start + struct.unpack_from(">I", data, start + 16 + 8 * i)[0]
        if struct.unpack_from(">I", data, at)[0] == _CODE_DIRECTORY:
            return _directory(data, at, start)
    return "the signature holds no code directory"


def _directory(data: bytes, at: int, start: int) -> str:
    """Compare the hash of every page before the signature with the directory's."""
    _, _, flags, hashes, _, _, slots, limit = struct.unpack_from(">8I", data, at + 4)
    size, _, _, page_bits = struct.unpack_from(">4B", data, at + 36)
    if not flags & _ADHOC:
        return "the signature is not ad hoc"
    if limit != start:
        return f"the signature covers {limit} bytes of {start}"
    page = 1 << page_bits
    for i in range(slots):
        wanted = data[at + hashes + i * size : at + hashes + (i + 1) * size]
        if hashlib.sha256(data[i * page : min((i + 1) * page, limit)]).digest() != wanted:
            return f"page {i} was changed after signing"
    return ""
