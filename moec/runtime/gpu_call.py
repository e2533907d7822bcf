"""One function of one block on a CUDA device: the checks of `call`, then launches on a stream.

A call never waits for the device and allocates only through the caller's library (results and
workspace, on its current stream), so it can be captured in a CUDA graph like any operation
of that library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..artifact import Function
from ..spec import ExpertsSpec
from . import abi, cuda
from .call import Call
from .gpu_tensors import view as gpu_view
from .libraries import Library
from .tensors import View

_ALIGN = _SLACK = 256  # of the workspace, as its intermediates are aligned within it


class GpuCall(Call):
    """A compiled function of one block on `device`; safe to call from several threads."""

    def __init__(
        self,
        name: str,
        function: Function,
        library: Library,
        parameters: Callable[[], Mapping[str, cuda.Memory]],
        spec: ExpertsSpec,
        device: int,
    ) -> None:
        super().__init__(name, function, library, parameters, spec, (1, 1))
        self._device = device

    def _view(self, tensor: Any, name: str, *, writable: bool = False) -> View:
        return gpu_view(tensor, name, self._device, writable=writable)

    def _run(self, index: int, tokens: int, views: list[View], outputs: list[int]) -> None:
        with cuda.current(self._device):
            ready = self._ready(index)
            for tensor, got in zip(ready.inputs, views, strict=True):
                tensor.data = got.address
            for tensor, place in zip(ready.outputs, outputs, strict=True):
                tensor.data = place
            for length in ready.lengths:
                length[0] = tokens
            size = ready.fixed + ready.per_token * tokens
            kind: Any = views[0].kind
            # Freed when this returns, on the stream that the launches are on: its allocator
            # gives it to later work of the same stream only.
            space, place = kind.empty((size + _SLACK,), "uint8")
            ready.space.data = place + -place % _ALIGN
            ready.room[0] = size
            cuda.use_stream(self._device, kind.stream())
            ready.call()
            del space

    def _parameter(self, name: str, bound: Mapping[str, Any]) -> int:
        return int(bound[name].address)

    def _tensor(self, shape: Any, dtype: str, data: int = 0) -> abi.DLTensor:
        tensor = super()._tensor(shape, dtype, data)
        tensor.device_type, tensor.device_id = cuda.DEVICE_TYPE, self._device
        return tensor
