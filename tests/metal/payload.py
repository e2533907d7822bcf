"""The MSL inside a compiled library, read from its bytes without TVM.

TVM stores imported modules as one blob: its length, the import tree, then kind and bytes of
every module. That of a Metal module: format, kernel descriptions, kernel -> text. All lengths
and counts are 64-bit little endian.
"""

from __future__ import annotations

import struct

_HEAD = struct.pack("<Q", 5) + b"metal"


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, form: str = "<Q") -> int:
        value = int(struct.unpack_from(form, self.data, self.at)[0])
        self.at += struct.calcsize(form)
        return value

    def text(self) -> str:
        size = self.number()
        value = self.data[self.at : self.at + size]
        if len(value) != size:
            raise ValueError("a text goes past the end")
        self.at += size
        return value.decode()


def payload(library: bytes) -> dict[str, str]:
    """Kernel name -> MSL, of the Metal module in a library; {} when there is none."""
    start = library.find(_HEAD)
    while start >= 0:
        reader = _Reader(library[start + len(_HEAD) + 8 :])  # past kind and length of the module
        try:
            return _module(reader)
        except (ValueError, struct.error, UnicodeDecodeError):
            start = library.find(_HEAD, start + 1)
    return {}


def _module(reader: _Reader) -> dict[str, str]:
    if reader.text() != "metal":
        raise ValueError("not MSL text")
    for _ in range(reader.number()):
        reader.text(), reader.text()
        for _ in range(reader.number()):  # types of the arguments
            reader.at += 4
        for _ in range(reader.number()):  # tags of the launch
            reader.text()
        for _ in range(reader.number()):  # tags of the arguments
            reader.at += 4
    return {reader.text(): reader.text() for _ in range(reader.number())}
