"""One function of one block on a CUDA device: the checks of `call`, then launches on a stream.

A call never waits for the device and allocates only through the caller's library (results and
workspace, on its current stream), so it can be captured in a CUDA graph like any operation
of that library.

Plain torch tensors that fit take a short way, which asks the same questions without building
views; whatever is unusual about a call sends it the long way, which also explains refusals.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..artifact import Function
from ..spec import ExpertsSpec
from . import abi, cuda
from .call import Call, Port
from .gpu_tensors import ALIGNMENT, torch_kind
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
        self._torch: Any = None  # torch as it was when `_dtypes` and `_kind` were made
        self._dtypes: dict[str, Any] = {}
        self._kind: Any = None
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
            ports = (*self._inputs, *self._outputs)
            self._dtypes = {p.dtype: getattr(torch, p.dtype) for p in ports}
            self._kind, self._torch = torch_kind(torch, self._device), torch
            self._current = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
        first = args[0]
        tokens = first.shape[0] if type(first) is torch.Tensor and first.dim() else 0
        if not tokens or self._current() != self._device:
            return None
        try:
            inputs = [self._place(p, a, tokens) for p, a in zip(self._inputs, args, strict=True)]
            place = 0 if out is None else self._place(self._outputs[0], out, tokens)
        except RuntimeError:  # sparse and nested tensors do not even say whether they fit
            return None
        if 0 in inputs:
            return None
        if out is None:
            results, outputs = self._make(self._kind, tokens)
        elif place and self._apart(inputs, place, tokens):
            results, outputs = [out], [place]
        else:
            return None
        self._launch(self._choose(tokens, schedule), tokens, inputs, outputs, self._kind)
        return results

    def _place(self, port: Port, tensor: Any, tokens: int) -> int:
        """The address of a tensor that is just as `port` wants it; 0 for any other."""
        torch = self._torch
        if (
            type(tensor) is not torch.Tensor
            or tensor.dtype is not self._dtypes[port.dtype]
            or tensor.get_device() != self._device
            or tensor.shape != (tokens, *port.tail)
            or tensor.requires_grad
            or not tensor.is_contiguous()
            or tensor.is_neg()
        ):
            return 0
        place: int = tensor.data_ptr()
        return 0 if place % ALIGNMENT else place

    def _view(self, tensor: Any, name: str, *, writable: bool = False) -> View:
        return gpu_view(tensor, name, self._device, writable=writable)

    def _run(self, index: int, tokens: int, views: list[View], outputs: list[int]) -> None:
        with cuda.current(self._device):
            places = [view.address for view in views]
            self._launch(index, tokens, places, outputs, views[0].kind)

    def _launch(
        self, index: int, tokens: int, inputs: list[int], outputs: list[int], kind: Any
    ) -> None:
        """Run a variant on the current device, which is this one, on the stream of `kind`."""
        ready = self._ready(index)
        for tensor, place in zip(ready.inputs, inputs, strict=True):
            tensor.data = place
        for tensor, place in zip(ready.outputs, outputs, strict=True):
            tensor.data = place
        for length in ready.lengths:
            length[0] = tokens
        size = ready.fixed + ready.per_token * tokens
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
