"""One function of one block as it is called: checks, output, variant by T, native call.

Everything that a call does not change is prepared once per thread in a Frame; a call
validates its tensors, writes their addresses and T into the frame and runs it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..artifact import Function, TensorType, Variant
from ..errors import InputError, TargetError
from ..spec import ExpertsSpec
from . import abi
from .libraries import Library, runtime
from .native import Native
from .pool import use_workers, workspace
from .tensors import Kind, View, address, view

_INT32 = (1 << 31) - 1
_SIZES = {name: bits // 8 for name, (_, bits) in abi.TYPES.items()}


class Port:
    """What an input or output must look like."""

    __slots__ = ("dtype", "name", "row", "size", "tail")

    def __init__(self, tensor: TensorType) -> None:
        self.name, self.dtype = tensor.name, tensor.dtype
        self.tail = tuple(int(d) for d in tensor.shape[1:])
        self.size = _SIZES[tensor.dtype]
        self.row = self.size * math.prod(self.tail)

    def __str__(self) -> str:
        return f"[{', '.join(('T', *map(str, self.tail)))}] {self.dtype}"

    def accept(self, got: View, name: str) -> None:
        """Raise InputError unless `got` has this rank, tail, dtype and element alignment."""
        if got.dtype != self.dtype:
            what, hint = f"has dtype {got.dtype}", _conversion(name, self.dtype, got.dtype)
        elif got.shape[1:] != self.tail or not got.shape:
            what, hint = f"has shape {list(got.shape)}", None
        elif got.address % self.size:
            what = f"starts at an address that is no multiple of its {self.size} byte elements"
            hint = f"{name}.copy() or {name}.clone()"
        else:
            return
        raise InputError(f"{name} {what}", where=name, need=str(self), hint=hint)


class Prepared:
    """A frame and the places in it that change from call to call.

    `native` is what `short` makes of it.
    """

    __slots__ = (
        "call", "fixed", "frame", "inputs", "lengths", "moving", "native", "outputs", "per_token",
        "room", "size", "space", "tokens",
    )  # fmt: skip

    def __init__(
        self, frame: abi.Frame, ports: tuple[int, int], lengths: list[Any], variant: Variant
    ) -> None:
        inputs, outputs = ports
        self.frame, self.call = frame, frame.call
        self.native: Native | None = None
        self.inputs = frame.tensors[:inputs]
        self.outputs = frame.tensors[-1 - outputs : -1]
        self.moving = self.inputs + self.outputs
        self.space = frame.tensors[-1]
        self.room, self.lengths = lengths[-1], lengths[:-1]
        self.fixed, self.per_token = variant.workspace
        self.tokens = self.size = 0  # what the lengths hold, and the size of the workspace

    def fill(self, tokens: int, places: list[int]) -> None:
        """Set T, and where inputs and outputs lie."""
        number = 0
        for tensor in self.moving:
            tensor.data = places[number]
            number += 1
        self.resize(tokens)

    def resize(self, tokens: int) -> None:
        """Set T; `size` is then that of the workspace."""
        if tokens != self.tokens:
            for length in self.lengths:
                length[0] = tokens
            self.room[0] = self.size = self.fixed + self.per_token * tokens
            self.tokens = tokens


class _Frames(threading.local):
    """The frames of a thread by variant, and what `short` used last."""

    def __init__(self) -> None:
        self.table: dict[int, Prepared] = {}
        self.last: Native | None = None


class Call:
    """A compiled function of one block; safe to call from several threads.

    `inputs` are the names of its inputs, in order.
    """

    def __init__(
        self,
        name: str,
        function: Function,
        library: Library,
        parameters: Callable[[], Mapping[str, Any]],
        spec: ExpertsSpec,
        threads: tuple[int, int],
    ) -> None:
        self.name = name
        self._function = function
        self._library = library
        self._parameters = parameters
        # Ids beyond these name nothing, however wide they come.
        experts = spec.num_experts + spec.zero_experts
        self._ids = {"topk_ids": experts, "token_ids": _INT32}
        self._threads, self._workers = threads
        self._inputs = [Port(t) for t in function.inputs]
        self._outputs = [Port(t) for t in function.outputs]
        self.inputs = tuple(port.name for port in self._inputs)
        self._most = _INT32 // spec.top_k  # kernels count rows in 32 bits
        self._ranges = [
            (i, v.schedule, v.tokens[0], self._most + 1 if v.tokens[1] is None else v.tokens[1])
            for i, v in enumerate(function.variants)
            if v.tokens
        ]
        self._frames = _Frames()

    @property
    def schedules(self) -> tuple[str, ...]:
        """The schedules that this function was compiled with, each once."""
        return tuple(dict.fromkeys(v.schedule for v in self._function.variants))

    def __call__(
        self, args: Sequence[Any], out: Any = None, schedule: str | None = None
    ) -> list[Any]:
        """Run the function on tensors; `out` takes the place of its only output.

        Raises InputError for a tensor that does not fit, TargetError for a schedule that the
        artifact does not hold.
        """
        views: list[View] = []
        for port, arg in zip(self._inputs, args, strict=True):
            got = self._view(arg, port.name)
            if got.dtype == "int64" and port.dtype == "int32":
                got = self._view(got.kind.as_int32(arg, self._ids[port.name]), port.name)
            port.accept(got, port.name)
            if views and got.shape[0] != views[0].shape[0]:
                raise self._uneven(port, port.name, got, views[0].shape[0])
            views.append(got)
        tokens = views[0].shape[0]
        index = self._choose(tokens, schedule)
        if out is None:
            results, addresses = self._make(views[0].kind, tokens)
        else:
            results, addresses = [out], [self._check_out(out, views, tokens)]
        if tokens:
            self._run(index, tokens, views, addresses)
        return results

    def _view(self, tensor: Any, name: str, *, writable: bool = False) -> View:
        return view(tensor, name, writable=writable)

    def _run(self, index: int, tokens: int, views: list[View], outputs: list[int]) -> None:
        self._start(index, tokens, [*(view.address for view in views), *outputs])

    def _start(self, index: int, tokens: int, places: list[int]) -> None:
        """Run a variant on the memory of its inputs and outputs."""
        ready = self._frames.table.get(index)
        if ready is None:
            ready = self._prepare(index)
        ready.fill(tokens, places)
        ready.space.data = workspace(ready.size)
        use_workers(self._workers)
        ready.call()

    def _ready(self, index: int) -> Prepared:
        """The calling thread's frame of a variant."""
        ready = self._frames.table.get(index)
        return self._prepare(index) if ready is None else ready

    def _tensor(self, shape: Any, dtype: str, data: int = 0) -> abi.DLTensor:
        """An argument in the memory that this function works on."""
        return abi.tensor(shape, dtype, data)

    def _parameter(self, name: str, bound: Mapping[str, Any]) -> int:
        """Where a parameter lies in that memory."""
        return address(bound[name])

    def _make(self, kind: Kind, tokens: int) -> tuple[list[Any], list[int]]:
        results, addresses = [], []
        for port in self._outputs:
            tensor, place = kind.empty((tokens, *port.tail), port.dtype)
            results.append(tensor)
            addresses.append(place)
        return results, addresses

    def _check_out(self, out: Any, views: list[View], tokens: int) -> int:
        """The address of a caller's output; InputError unless it fits and overlaps no input."""
        port = self._outputs[0]
        got = self._view(out, "out", writable=True)
        port.accept(got, "out")
        if got.shape[0] != tokens:
            raise self._uneven(port, "out", got, tokens)
        end = got.address + tokens * port.row
        for taken, given in zip(self._inputs, views, strict=True):
            given_end = given.address + tokens * taken.row
            if got.address < given_end and given.address < end:
                raise InputError(
                    f"out overlaps {taken.name} in memory",
                    where="out",
                    need="memory of its own, as outputs are written while inputs are read",
                    hint="leave out=None, or pass another tensor",
                )
        return got.address

    def _choose(self, tokens: int, schedule: str | None) -> int:
        """Index of the variant for T: the first whose range holds it, or of a forced schedule."""
        if tokens > self._most:
            raise self._too_many(tokens)
        for i, name, low, high in self._ranges:
            if low <= tokens < high and schedule in (None, name):
                return i
        if schedule is None:
            if tokens:
                raise self._too_many(tokens)
            return 0
        # A range is where a schedule is best, not where it is right: a name overrules it.
        for i, variant in enumerate(self._function.variants):
            if variant.schedule == schedule:
                return i
        raise TargetError(
            f"function {self.name!r} was not compiled with schedule {schedule!r}",
            where="schedule",
            need=f"one of {', '.join(self.schedules)}",
            hint=f"compile with --schedule {schedule}",
        )

    def _prepare(self, index: int) -> Prepared:
        variant = self._function.variants[index]
        shapes: dict[tuple[int, ...], Any] = {}
        tensors = []
        for port in self._inputs:
            tensors.append(self._tensor(_shape(shapes, port), port.dtype))
        bound = self._parameters()
        keep: list[Any] = [bound]
        for name in self._function.parameters:
            dims = abi.dims(bound[name].shape)
            keep.append(dims)
            place = self._parameter(name, bound)
            tensors.append(self._tensor(dims, str(bound[name].dtype), place))
        for port in self._outputs:
            tensors.append(self._tensor(_shape(shapes, port), port.dtype))
        space = abi.dims([0])
        tensors.append(self._tensor(space, "uint8"))
        lengths = [*shapes.values(), space]
        function = self._library.function(variant.symbol)
        frame = abi.Frame(runtime(), function, tensors, [self._threads], (keep, lengths))
        ports = len(self._inputs), len(self._outputs)
        ready = Prepared(frame, ports, lengths, variant)
        self._frames.table[index] = ready
        return ready

    def _uneven(self, port: Port, name: str, got: View, tokens: int) -> InputError:
        first = self._inputs[0].name
        return InputError(
            f"{name} has {got.shape[0]} rows, {first} has {tokens}",
            where=name,
            need=f"{port} with T = {tokens}",
        )

    def _too_many(self, tokens: int) -> InputError:
        ranges = ", ".join(f"[{low}, {high})" for _, _, low, high in self._ranges)
        return InputError(
            f"{self._inputs[0].name} has T = {tokens} rows",
            where=self._inputs[0].name,
            need=f"T in {ranges or 'no range: every variant must be named by schedule='}",
            hint="split the batch, or name a schedule",
        )


def _shape(shapes: dict[tuple[int, ...], Any], port: Port) -> Any:
    """The [T, ...] shape of a port, shared by ports that look alike."""
    return shapes.setdefault(port.tail, abi.dims((0, *port.tail)))


def _conversion(name: str, wanted: str, got: str) -> str:
    if got in ("uint16", "|V2") and wanted == "bfloat16":
        return f"{name}.view(ml_dtypes.bfloat16), if these are the bits of bfloat16"
    numpy = "ml_dtypes.bfloat16" if wanted == "bfloat16" else f"numpy.{wanted}"
    return f"{name}.astype({numpy}) or {name}.to(torch.{wanted})"
