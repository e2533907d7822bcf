"""The C side of a call: what moec.schedules.calls lays out in every library, seen from Python.

The fields here and there are the same. Whatever C refuses goes the long way of `call`, which says
why; so does every call of a library without these functions.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .abi import DLTensor

if TYPE_CHECKING:
    from .call import Prepared

DONE, REFUSED, UNREADY = 0, 1, 2  # what became of a call; anything else: it failed
_PORTS = 8
_C_CONTIGUOUS, _WRITEABLE = 1, 0x400
_FLAGS = _C_CONTIGUOUS | _WRITEABLE
_POINTER = ctypes.c_void_p


class Thread(ctypes.Structure):
    """What a thread has ready for calls: workers, and a workspace of `size` bytes."""

    _fields_ = (("workers", ctypes.c_int64), ("space", _POINTER), ("size", ctypes.c_int64))


class _Port(ctypes.Structure):
    _fields_ = (
        ("own", _POINTER),
        ("dtype", _POINTER),
        ("row", ctypes.c_int64),
        ("align", ctypes.c_int64),
    )


class Device(ctypes.Structure):
    """Addresses of functions of a device: to ask for the current one, set the stream of launches,
    and allocate and release memory for work on the current stream of torch.
    """

    _fields_ = (
        ("current", _POINTER),
        ("set_stream", _POINTER),
        ("allocate", _POINTER),
        ("release", _POINTER),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("run", _POINTER),
        ("function", _POINTER),
        ("values", _POINTER),
        ("count", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("thread", _POINTER),
        ("workers", ctypes.c_int64),
        ("need", ctypes.c_int64),
        ("space", _POINTER),
        ("device", _POINTER),
        ("ports", _Port * _PORTS),
    )


class _Exchange(ctypes.Structure):
    """DLPackExchangeAPI."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("older", _POINTER),
        ("allocate", _POINTER),
        ("managed_in", _POINTER),
        ("managed_out", _POINTER),
        ("read", _POINTER),
        ("stream", _POINTER),
    )


class _Array(ctypes.Structure):
    """PyArrayObject_fields of NumPy's C ABI, behind the header of an object."""

    _fields_ = (
        ("data", _POINTER),
        ("nd", ctypes.c_int),
        ("dims", _POINTER),
        ("strides", _POINTER),
        ("base", _POINTER),
        ("dtype", _POINTER),
        ("flags", ctypes.c_int),
    )


class Entries:
    """The C functions of one loaded library, by the number of tensors of a call."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """AttributeError for a library without them."""
        # Python's lock is held while Python's objects are read, and C releases it for the run.
        held = ctypes.PyDLL(library._name, handle=library._handle)
        setup = held.moec_call_1_setup
        setup.argtypes = (ctypes.c_ssize_t, ctypes.py_object, _POINTER, _POINTER)
        setup.restype = None
        python = ctypes.pythonapi.PyEval_SaveThread, ctypes.pythonapi.PyEval_RestoreThread
        setup(object.__basicsize__, np.ndarray, *(ctypes.cast(f, _POINTER) for f in python))
        self.calls: dict[int, Callable[..., int]] = {}
        for count in (2, 3, 4):
            self.calls[count] = held[f"moec_call_1_with{count}"]
            self.calls[count].argtypes = (_POINTER, _POINTER, *[ctypes.py_object] * count)  # type: ignore[attr-defined]


class Native:
    """A compiled function as C calls it, for one thread and one T at a time.

    `call(place, exchange, *inputs, *outputs)` returns what became of a call with tensors of
    torch, or with NumPy arrays where `exchange` is None. `tokens` and `schedule` are those that
    it was last turned to, and `forms` the (shape, dtype) of its results then.
    """

    __slots__ = ("_call", "_keep", "call", "forms", "place", "ready", "schedule", "tokens")

    def __init__(
        self,
        ready: Prepared,
        call: Callable[..., int],
        ports: list[tuple[DLTensor, Any, int, int]],
        place: Thread | Device,
        workers: int,
    ) -> None:
        """`ports` are the inputs, then the outputs: what the function is given, NumPy's dtype,
        bytes of a token, and what its address must be a multiple of.

        `place` is where it runs: `workers` threads of the calling one, or a device.
        """
        frame = ready.frame
        made = _Call(frame.entry, frame.function.handle, ctypes.addressof(frame.values))
        made.count, made.inputs = len(frame.values), len(ready.inputs)
        made.outputs = len(ports) - made.inputs
        made.space = ctypes.addressof(ready.space)
        made.workers = workers
        if isinstance(place, Thread):
            made.thread = ctypes.addressof(place)
        else:
            made.device = ctypes.addressof(place)
        for port, (own, dtype, row, align) in zip(made.ports, ports, strict=False):
            port.own, port.dtype = ctypes.addressof(own), id(dtype)
            port.row, port.align = row, align
        self.ready, self._call, self._keep = ready, made, (place, ports)
        self.call, self.place = call, ctypes.addressof(made)
        self.tokens = 0
        self.schedule: str | None = None
        self.forms: tuple[tuple[tuple[int, ...], str], ...] = ()

    def turn(self, tokens: int, schedule: str | None, need: int) -> None:
        """Calls are of this T and named schedule from now on, and need that much workspace."""
        self.tokens, self.schedule, self._call.need = tokens, schedule, need


def exchange(torch: Any) -> int | None:
    """The address of torch's DLPackExchangeAPI; None where it has none that C here can use."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.argtypes, get.restype = (ctypes.py_object, ctypes.c_char_p), _POINTER
    place: int | None = get(capsule, b"dlpack_exchange_api")
    if not place:
        return None
    found = _Exchange.from_address(place)
    return place if found.major == 1 and found.read and found.stream else None


@functools.cache
def reads_arrays() -> bool:
    """Whether this NumPy's arrays have their fields where NumPy's C ABI says."""
    if sys.implementation.name != "cpython":
        return False
    probe = np.zeros((2, 3), np.float32)
    probe.flags.writeable = False
    fields = _Array.from_address(id(probe) + object.__basicsize__)
    kind = _POINTER.from_address(id(probe) + object.__basicsize__ - ctypes.sizeof(_POINTER))
    if fields.nd != 2 or kind.value != id(np.ndarray) or fields.dtype != id(probe.dtype):
        return False
    dims = (ctypes.c_ssize_t * 2).from_address(fields.dims)
    return (
        tuple(dims) == (2, 3)
        and fields.data == probe.__array_interface__["data"][0]
        and fields.flags & _FLAGS == _C_CONTIGUOUS
    )
