"""One function of one block on a CUDA device: the checks of `call`, then launches on a stream.

A call never waits for the device and allocates only through the caller's library (results and
workspace, on its current stream), so it can be captured in a CUDA graph like any operation
of that library.

Plain torch tensors that fit take the short way of `short`; whatever is unusual about a call sends
it the long way, which also explains refusals.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..artifact import Function
from ..spec import ExpertsSpec
from . import abi, cuda
from .call import Prepared
from .gpu_tensors import ALIGNMENT, GpuKind, torch_kind
from .gpu_tensors import view as gpu_view
from .libraries import Library
from .native import Native
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
        self._current: Any = None  # asks for the current device

    def __call__(
        self, args: Sequence[Any], out: Any = None, schedule: str | None = None
    ) -> list[Any]:
        """Run the function on tensors of the device; raises what Call raises."""
        torch = sys.modules.get("torch")
        done = None if torch is None else self._short(torch, args, out, schedule)
        return super().__call__(args, out, schedule) if done is None else done

    def _short(
        self, torch: Any, args: Sequence[Any], out: Any, schedule: str | None
    ) -> list[Any] | None:
        """The whole call, or None when it is for the long way."""
        if self._torch is not torch:
            self._meet(torch)
        if self._current() != self._device:
            return None
        return super()._short(torch, args, out, schedule)

    def _meet(self, torch: Any) -> None:
        self._current = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
        super()._meet(torch)

    def _kind_of(self, torch: Any) -> Any:
        return torch_kind(torch, self._device)

    def _native(self, ready: Prepared) -> Native | None:
        return self._laid_out(ready, None, cuda.stream_setter())

    def _run_tensors(self, native: Native, args: Sequence[Any], results: list[Any]) -> int:
        arguments = native.place, self._exchange, *args, *results
        stream = self._kind.stream()
        return int(self._with_workspace(native.ready, self._kind, stream, native.call, arguments))

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
        self._with_workspace(ready, kind, stream, ready.call)

    def _with_workspace(
        self,
        ready: Prepared,
        kind: GpuKind,
        stream: int,
        function: Callable[..., Any],
        arguments: Sequence[Any] = (),
    ) -> Any:
        held, place = kind.take(ready.size + _SLACK, stream)
        try:
            ready.space.data = place + -place % _ALIGN
            return function(*arguments)
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
