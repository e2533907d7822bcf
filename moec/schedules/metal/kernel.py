"""One Metal kernel: its launch as a PrimFunc, its text as an attribute of it.

The PrimFunc holds what TVM is good at (argument checks, packing, the launch) and calls one MSL
function. Every buffer argument is a device buffer, a position in it and a length, in elements,
because Metal buffers are opaque: several arguments may be parts of one workspace. What a block's
sizes are is passed as numbers and not written into the text, so that kernels of blocks that
differ in size have one text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..buffers import ITEM_BYTES, Buf, Kernel, PerToken
from .source import TYPES, part

MSL = "moec.msl"  # the attribute that holds the text of every stage, in order
Grid = Callable[[Any, SimpleNamespace], Sequence[Any]]


@dataclass(frozen=True)
class Stage:
    """One launch: `body` is MSL statements that see the arguments and constants by name.

    Besides, `tokens`, `bx`, `by`, `tid` and (with `scratch4` > 0) `scratch`, an array of that
    many float4 in threadgroup memory. `absent` are pointers to float that the body names and
    never follows. `grid(tokens, constants)` gives one or two extents.
    """

    parts: tuple[str, ...]
    types: str
    body: str
    grid: Grid
    threads: int
    scratch4: int = 0
    absent: tuple[str, ...] = ()


def build(
    symbol: str,
    args: tuple[Buf, ...],
    reads: int,
    constants: dict[str, int],
    stages: Sequence[Stage],
    repeat: str | None = None,
) -> Kernel:
    """A kernel of which the first `reads` arguments are only read.

    With `repeat`, the name of a constant, all stages run that many times in order, and see the
    number of the round as `only`.
    """
    names = [*constants, *(["only"] if repeat else [])]
    texts = [_text(i, stage, args, reads, names) for i, stage in enumerate(stages)]
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol)
        T.func_attr({"global_symbol": symbol, "tirx.noalias": False, MSL: texts})
        handles = [T.arg(f"{a.name}_handle", T.handle()) for a in args]
        places = [T.arg(f"{a.name}_at", T.int64()) for a in args]
        counts = [T.arg(f"{a.name}_count", T.int64()) for a in args]
        tokens = T.arg("tokens", T.int64())
        values = SimpleNamespace(**{n: T.arg(n, T.int32()) for n in constants})
        pointers = []
        for handle, arg in zip(handles, args, strict=True):
            shape = [tokens * d.count if isinstance(d, PerToken) else tirx.const(d, "int64")
                     for d in arg.shape]  # fmt: skip
            # Nobody looks behind the handle of a Metal buffer, so its alignment says nothing.
            align = ITEM_BYTES[arg.dtype]
            pointers.append(T.match_buffer(handle, shape, arg.dtype, align=align).data)
        operands = [x for triple in zip(pointers, places, counts, strict=True) for x in triple]

        def launch_all(*only: Any) -> None:
            for index, stage in enumerate(stages):
                numbers = [tokens, *vars(values).values(), *only]
                _launch(index, stage, operands, numbers, tokens, values)

        if repeat:
            with T.serial(tirx.const(0, "int32"), getattr(values, repeat)) as only:
                launch_all(only)
        else:
            launch_all()
    return Kernel(symbol, args, ib.get(), tuple(constants.values()))


def function_name(stage: int) -> str:
    """The MSL function that the kernel of a stage calls."""
    return "moec_body" if stage == 0 else f"moec_body_{stage}"


def _launch(
    index: int, stage: Stage, operands: list[Any], numbers: list[Any], tokens: Any, values: Any
) -> None:
    extents = [*stage.grid(tirx.Cast("int32", tokens), values), tirx.const(1, "int32")][:2]
    with (
        T.launch_thread("blockIdx.x", extents[0]) as bx,
        T.launch_thread("blockIdx.y", extents[1]) as by,
        T.launch_thread("threadIdx.x", stage.threads) as tid,
    ):
        scratch = []
        if stage.scratch4:
            scratch = [T.alloc_buffer((stage.scratch4,), "float32x4", scope="shared").data]
        name = function_name(index)
        T.evaluate(T.call_extern("int32", name, *operands, *scratch, *numbers, bx, by, tid))


def _text(
    index: int, stage: Stage, args: tuple[Buf, ...], reads: int, constants: Sequence[str]
) -> str:
    parameters, lines = [], []
    for i, arg in enumerate(args):
        kind = TYPES[arg.dtype]
        parameters += [f"device {kind}* p{i}", f"long at{i}", f"long count{i}"]
        const = "const " if i < reads else ""
        lines.append(f"{const}device {kind}* {arg.name} = MOEC_BOUND(p{i} + at{i}, count{i});")
    lines += [f"const device float* {name} = (const device float*)p0;" for name in stage.absent]
    scratch = ["threadgroup float4* scratch"] if stage.scratch4 else []
    numbers = ["long tokens_", *(f"int {c}" for c in constants), "int bx", "int by", "int tid"]
    lines += ["int tokens = int(tokens_);", stage.body]
    body = "\n  ".join(lines)
    signature = ", ".join([*parameters, *scratch, *numbers])
    library = "\n".join(part(name) for name in ("common", *stage.parts))
    return (
        f"{library}\n{stage.types}\n"
        f"inline void {function_name(index)}({signature}) {{\n  {body}\n}}\n"
    )


def ceil_div(value: Any, by: int) -> Any:
    """ceil(value / by) of int32 expressions."""
    return tirx.floordiv(value + (by - 1), by)
