"""Device "metal": buffers of TVM's Metal runtime, and calls whose tensors are staged in them.

Callers' tensors are host memory (NumPy, torch, DLPack): inputs are copied into device buffers
before a call and the result back after it, on the runtime's default stream. A Metal buffer is
an opaque handle: nothing here does arithmetic on one. Parameters are uploaded once a layer.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Mapping
from typing import Any

from ..errors import MoecError, ResourceError, TargetError
from . import abi
from .call import Call
from .libraries import optional, runtime
from .packing import Array
from .tensors import View, address

_METAL = 8  # DLPack's device type
_DTYPE, _DEVICE, _POINTER, _DLTENSOR, _NONE = 5, 6, 4, 7, 0
_UINT8 = 1 | 8 << 8 | 1 << 16  # DLDataType {code uint, bits 8, lanes 1}
_HEADER = 24  # bytes of a TVM object before the tensor in it


class Buffer:
    """Device memory of `size` bytes; freed with this value."""

    def __init__(self, device: MetalDevice, size: int) -> None:
        self.size = size
        self._device = device
        self._owner = device.allocate(size)
        self.handle = int(abi.DLTensor.from_address(self._owner.handle + _HEADER).data or 0)

    def write(self, place: int, size: int) -> None:
        """Copy `size` bytes of host memory at `place` into the buffer."""
        self._device.copy("runtime.TVMTensorCopyFromBytes", self.handle, place, size)

    def read(self, place: int, size: int) -> None:
        """Wait for all launches, and copy `size` bytes to host memory at `place`."""
        self._device.copy("runtime.TVMTensorCopyToBytes", self.handle, place, size)


class MetalDevice:
    """One Metal device of this machine, with the parameters that were uploaded to it.

    Raises TargetError when this process has no Metal runtime or the device does not exist.
    """

    def __init__(self, index: int) -> None:
        self._ffi = runtime()
        self._device = abi.Value(_DEVICE, 0, _METAL | index << 32)
        if not self._exists():
            optional("tvm", "libtvm_runtime_metal")
        if not self._exists():
            raise TargetError(
                f"this machine has no device metal:{index}",
                need="a Mac with Apple silicon and the macOS build of apache-tvm",
                hint="load the artifact for another device that it was compiled for",
            )
        self._allocate = self._ffi.function("runtime.TVMTensorAllocWithScope")
        self._shape = self._ffi.function("ffi.Shape")
        self._function = functools.cache(self._ffi.function)
        self._parameters: dict[tuple[int, str], tuple[Buffer, Array]] = {}
        self._lock = threading.Lock()
        self._own = threading.local()

    def _exists(self) -> bool:
        try:
            self._ffi.function("device_api.metal")
            found = self._ffi.call(self._ffi.function("runtime.GetDeviceAttr"), _METAL,
                                   self._device.bits >> 32, 0)  # fmt: skip
        except MoecError:
            return False
        return bool(found)

    def allocate(self, size: int) -> Any:
        """A TVM tensor of `size` bytes; ResourceError when there is no memory for it."""
        shape = self._ffi.call(self._shape, max(size, 1))
        dtype, none = abi.Value(_DTYPE, 0, _UINT8), abi.Value(_NONE, 0, 0)
        try:
            return self._ffi.call(self._allocate, shape, dtype, self._device, none)
        except MoecError as error:
            raise ResourceError(
                f"{size / 1e9:.2f} GB of device memory cannot be allocated", where=error.message
            ) from None

    def copy(self, name: str, handle: int, place: int, size: int) -> None:
        """Call one of TVM's two copies between a buffer and host memory."""
        dims = abi.dims([size])
        tensor = on_device(abi.tensor(dims, "uint8", handle))
        view = abi.Value(_DLTENSOR, 0, ctypes.addressof(tensor))
        self._ffi.call(self._function(name), view, abi.Value(_POINTER, 0, place), size)

    def parameter(self, layer: int, name: str, array: Array) -> int:
        """The handle of a parameter's buffer, uploaded when it is first asked for."""
        with self._lock:
            if (layer, name) not in self._parameters:
                buffer = Buffer(self, array.nbytes)
                buffer.write(address(array), array.nbytes)
                self._parameters[layer, name] = buffer, array
            return self._parameters[layer, name][0].handle

    def scratch(self, name: Any, size: int) -> Buffer:
        """A buffer of at least `size` bytes that belongs to the calling thread, by name."""
        table = self._own.__dict__
        if name not in table or table[name].size < size:
            table[name] = Buffer(self, size)
        found: Buffer = table[name]
        return found


class MetalCall(Call):
    """A compiled function of one block on a Metal device."""

    def __init__(self, device: MetalDevice, layer: int, *args: Any) -> None:
        super().__init__(*args)
        self._device, self._layer = device, layer

    def _tensor(self, shape: Any, dtype: str, data: int = 0) -> abi.DLTensor:
        return on_device(super()._tensor(shape, dtype, data))

    def _parameter(self, name: str, bound: Mapping[str, Any]) -> int:
        return self._device.parameter(self._layer, name, bound[name])

    def _run(self, index: int, tokens: int, views: list[View], outputs: list[int]) -> None:
        ready = self._ready(index)
        staged = []
        for port, tensor, got in zip(self._inputs, ready.inputs, views, strict=True):
            buffer = self._device.scratch(port.name, tokens * port.row)
            buffer.write(got.address, tokens * port.row)
            tensor.data = buffer.handle
        for port, tensor in zip(self._outputs, ready.outputs, strict=True):
            # An output may have the name of an input of another function: "topk_ids".
            size = tokens * port.row
            staged.append((self._device.scratch(f"out {port.name}", size), size))
            tensor.data = staged[-1][0].handle
        for length in ready.lengths:
            length[0] = tokens
        size = ready.fixed + ready.per_token * tokens
        ready.space.data = self._device.scratch("workspace", size).handle
        ready.room[0] = size
        ready.call()
        for (buffer, size), place in zip(staged, outputs, strict=True):
            buffer.read(place, size)


def on_device(tensor: abi.DLTensor) -> abi.DLTensor:
    """The same tensor, its data being the handle of a Metal buffer."""
    tensor.device_type = _METAL
    return tensor
