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
from .call import Call, _Prepared, _shape
from .gpu_tensors import view as gpu_view
from .libraries import Library, runtime
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
        super().__init__(name, function, library, {}.copy, spec, (1, 1))
        self._memory = parameters
        self._device = device

    def _view(self, tensor: Any, name: str, *, writable: bool = False) -> View:
        return gpu_view(tensor, name, self._device, writable=writable)

    def _run(self, index: int, tokens: int, views: list[View], outputs: list[int]) -> None:
        with cuda.current(self._device):
            ready = self._frames.table.get(index)
            if ready is None:
                ready = self._prepare(index)
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

    def _prepare(self, index: int) -> _Prepared:
        variant = self._function.variants[index]
        shapes: dict[tuple[int, ...], Any] = {}
        bound = self._memory()
        keep: list[Any] = [bound]
        tensors = [self._tensor(_shape(shapes, p), p.dtype, 0) for p in self._inputs]
        for name in self._function.parameters:
            dims = abi.dims(bound[name].shape)
            keep.append(dims)
            tensors.append(self._tensor(dims, bound[name].dtype, bound[name].address))
        tensors += [self._tensor(_shape(shapes, p), p.dtype, 0) for p in self._outputs]
        space = abi.dims([0])
        tensors.append(self._tensor(space, "uint8", 0))
        lengths = [*shapes.values(), space]
        function = self._library.function(variant.symbol)
        frame = abi.Frame(runtime(), function, tensors, [1], (keep, lengths))
        ready = _Prepared(frame, (len(self._inputs), len(self._outputs)), lengths, variant)
        self._frames.table[index] = ready
        return ready

    def _tensor(self, shape: Any, dtype: str, data: int = 0) -> abi.DLTensor:
        tensor = abi.tensor(shape, dtype, data)
        tensor.device_type, tensor.device_id = cuda.DEVICE_TYPE, self._device
        return tensor
