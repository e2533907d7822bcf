"""The C ABI of tvm_ffi through ctypes: functions, arguments and errors.

Everything goes through libtvm_ffi.so. The Python package tvm_ffi would import torch, and knows
neither NumPy's bfloat16 nor read-only arrays. A tensor is a DLTensor that borrows memory; whoever
makes a call keeps that memory alive until it ends.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from ..errors import MoecError

_NONE, _INT, _BOOL, _DLTENSOR, _STRING, _OBJECTS = 0, 1, 2, 7, 8, 64
_CPU = 1
# DLPack's type codes and bits.
TYPES = {
    "float32": (2, 32),
    "float16": (2, 16),
    "int32": (0, 32),
    "uint16": (1, 16),
    "bfloat16": (4, 16),
    "uint8": (1, 8),
    "int8": (0, 8),
}


class Value(ctypes.Structure):
    """TVMFFIAny: one argument or result."""

    _fields_ = (("kind", ctypes.c_int32), ("zero", ctypes.c_uint32), ("bits", ctypes.c_int64))


class DLTensor(ctypes.Structure):
    """DLPack's tensor without an owner."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Bytes(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


def _bytes(text: bytes) -> _Bytes:
    """A view of `text`, which must outlive it."""
    return _Bytes(ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p), len(text))


class _Error(ctypes.Structure):
    """An error object: the object header (24 bytes), then its texts."""

    _fields_ = (("header", ctypes.c_uint64 * 3), ("kind", _Bytes), ("message", _Bytes))


class Ffi:
    """A loaded libtvm_ffi.so."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer = ctypes.c_void_p
        self.call_raw = library.TVMFFIFunctionCall
        self.call_raw.argtypes = (pointer, pointer, ctypes.c_int32, pointer)
        self.entry = ctypes.cast(self.call_raw, pointer).value
        self._get_global = library.TVMFFIFunctionGetGlobal
        self._get_global.argtypes = (pointer, pointer)
        self._take_error = library.TVMFFIErrorMoveFromRaised
        self._take_error.argtypes = (pointer,)
        self._take_error.restype = None
        self._release = library.TVMFFIObjectDecRef
        self._release.argtypes = (pointer,)

    def function(self, name: str) -> Object:
        """A global function of the runtime; MoecError if there is none of that name."""
        text, handle = name.encode(), ctypes.c_void_p()
        code = self._get_global(ctypes.byref(_bytes(text)), ctypes.byref(handle))
        if code or not handle.value:
            raise MoecError(f"the TVM runtime has no function {name!r}")
        return Object(self, handle.value, _OBJECTS + 4)

    def call(self, function: Object, *args: int | bool | str | Object | Value) -> Any:
        """Call `function`; the result is None, an int, or an Object that owns its handle.

        A Value is passed on as it is: a device, a dtype, a pointer.
        """
        values = (Value * len(args))()
        keep = []
        for value, arg in zip(values, args, strict=True):
            if isinstance(arg, Object):
                value.kind, value.bits = arg.kind, arg.handle
            elif isinstance(arg, Value):
                value.kind, value.bits = arg.kind, arg.bits
            elif isinstance(arg, str):
                keep.append(ctypes.create_string_buffer(arg.encode()))
                value.kind, value.bits = _STRING, ctypes.addressof(keep[-1])
            else:
                value.kind, value.bits = (_BOOL if isinstance(arg, bool) else _INT), int(arg)
        result = Value()
        if self.call_raw(
            function.handle, ctypes.addressof(values), len(args), ctypes.addressof(result)
        ):
            raise MoecError(self.error())
        if result.kind >= _OBJECTS:
            return Object(self, result.bits, result.kind)
        return None if result.kind == _NONE else result.bits

    def error(self) -> str:
        """Take the message of the error that the last failed call on this thread raised."""
        handle = ctypes.c_void_p()
        self._take_error(ctypes.byref(handle))
        if not handle.value:
            return "the TVM runtime failed without a message"
        cell = _Error.from_address(handle.value)
        kind = ctypes.string_at(cell.kind.data, cell.kind.size)
        message = ctypes.string_at(cell.message.data, cell.message.size)
        self._release(handle)
        return b": ".join((kind, message)).decode(errors="replace")

    def release(self, handle: int) -> None:
        """Give up one reference to an object."""
        self._release(handle)


class Object:
    """A reference to a runtime object (function, module, array), given up with this value."""

    __slots__ = ("_ffi", "handle", "kind")

    def __init__(self, ffi: Ffi, handle: int, kind: int) -> None:
        self._ffi, self.handle, self.kind = ffi, handle, kind

    def __del__(self) -> None:
        self._ffi.release(self.handle)


def tensor(shape: ctypes.Array[ctypes.c_int64], dtype: str, data: int = 0) -> DLTensor:
    """A DLTensor on the CPU over memory at `data`; `shape` must outlive it."""
    code, bits = TYPES[dtype]
    return DLTensor(data, _CPU, 0, len(shape), code, bits, 1, ctypes.addressof(shape), None, 0)


def dims(shape: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """A shape as C wants it."""
    return (ctypes.c_int64 * len(shape))(*shape)


class Frame:
    """The arguments of one compiled symbol, filled once and then only touched where they change.

    `tensors` and `ints` are in argument order, tensors first. A frame belongs to one thread.
    """

    __slots__ = (
        "_args", "_count", "_ffi", "_keep", "_result", "entry", "function", "tensors", "values",
    )  # fmt: skip

    def __init__(
        self,
        ffi: Ffi,
        function: Object,
        tensors: Sequence[DLTensor],
        ints: Sequence[int],
        keep: Any,
    ) -> None:
        count = len(tensors) + len(ints)
        self._ffi, self.function, self._count = ffi, function, count
        self.entry = ffi.entry  # of C, to call the function by
        self._keep = keep  # shapes and parameter memory
        self.tensors = tuple(tensors)
        self.values = (Value * count)()
        for value, item in zip(self.values, tensors, strict=False):
            value.kind, value.bits = _DLTENSOR, ctypes.addressof(item)
        for value, number in zip(self.values[len(tensors) :], ints, strict=True):
            value.kind, value.bits = _INT, number
        self._result = Value()
        self._args = ctypes.addressof(self.values), ctypes.addressof(self._result)

    def call(self) -> None:
        """Run the symbol; the interpreter lock is released while it runs."""
        args, result = self._args
        if self._ffi.call_raw(self.function.handle, args, self._count, result):
            raise MoecError(
                "a compiled function refused its arguments or failed",
                where=self._ffi.error(),
                hint="this is a bug in moec, please report it with this message",
            )
