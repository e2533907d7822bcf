"""One function of one block on a CUDA device: the checks of `call`, then launches on a stream.

A call never waits for the device and allocates only through the caller's library (results and
workspace, on its current stream), so it can be captured in a CUDA graph like any operation
of that library.

Plain torch tensors that fit take the short way of `short`; whatever is unusual about a call sends
it the long way, which also explains refusals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..artifact import Function
from ..spec import ExpertsSpec
from . import abi, cuda
from .gpu_tensors import ALIGNMENT, torch_kind
from .gpu_tensors import view as gpu_view
from .libraries import Library
from .native import Device
from .short import ShortCall
from .tensors import View

_ALIGN = _SLACK = 256  # of the workspace, as its intermediates are aligned within it


class GpuCall(ShortCall):
    """A compiled function of one block on `device`; safe to call from several threads."""

    alignment = ALIGNMENT

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

    def __call__(
        self, args: Sequence[Any], out: Any = None, schedule: str | None = None
    ) -> list[Any]:
        """Run the function on tensors of the device; raises what Call raises."""
        kind, done = type(args[0]), None
        if kind is self._plain or self._takes(kind):
            done = self._short(args, out, schedule)
        return super().__call__(args, out, schedule) if done is None else done

    def _kind_of(self, torch: Any) -> Any:
        return torch_kind(torch, self._device)

    def _place(self) -> Device | None:
        allocator = self._kind.allocator()
        return cuda.functions(*allocator) if allocator else None

    def _view(self, tensor: Any, name: str, *, writable: bool = False) -> View:
        return gpu_view(tensor, name, self._device, writable=writable)

    def _run(self, index: int, tokens: int, views: list[View], outputs: list[int]) -> None:
        with cuda.current(self._device):
            places = [*(view.address for view in views), *outputs]
            self._launch(index, tokens, places, views[0].kind)

    def _launch(self, index: int, tokens: int, places: list[int], kind: Any) -> None:
        """Run a variant on the current device, which is this one, on the stream of `kind`."""
        ready = self._ready(index)
        ready.fill(tokens, places)
        stream = kind.stream()
        cuda.use_stream(self._device, stream)
        held, place = kind.take(ready.size + _SLACK, stream)
        try:
            ready.space.data = place + -place % _ALIGN
            ready.call()
        finally:
            # The launches may still be waiting. What is given back goes to later work of the
            # same stream only.
            kind.give(held)

    def _parameter(self, name: str, bound: Mapping[str, Any]) -> int:
        return int(bound[name].address)

    def _tensor(self, shape: Any, dtype: str, data: int = 0) -> abi.DLTensor:
        tensor = super()._tensor(shape, dtype, data)
        tensor.device_type, tensor.device_id = cuda.DEVICE_TYPE, self._device
        return tensor
