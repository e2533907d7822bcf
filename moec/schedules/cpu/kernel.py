"""One compiled CPU kernel: its symbol, its argument buffers and its PrimFunc.

Every kernel has the same calling convention: the buffers in order, then as int64 `tokens`
(only when a buffer depends on it) and `threads`, the number of chunks that the work is split
into; results never depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..buffers import ITEM_BYTES, Buf, Kernel, PerToken
from . import llvm
from .emit import Emit, i64
from .isa import Isa

Body = Callable[[Emit, SimpleNamespace, Any, Any], None]


def build(symbol: str, isa: Isa, args: tuple[Buf, ...], body: Body) -> Kernel:
    """Build a kernel; `body(em, buffers by name, tokens, threads)` emits its statements."""
    em = Emit(isa)
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol)
        T.func_attr({"global_symbol": symbol, "tirx.noalias": True})
        handles = [T.arg(f"{a.name}_handle", T.handle()) for a in args]
        per_token = any(isinstance(d, PerToken) for a in args for d in a.shape)
        tokens = T.arg("tokens", T.int64()) if per_token else i64(1)
        threads = T.arg("threads", T.int64())
        bufs = SimpleNamespace()
        for handle, arg in zip(handles, args, strict=True):
            shape = [d.count * tokens if isinstance(d, PerToken) else i64(d) for d in arg.shape]
            align = ITEM_BYTES[arg.dtype] if arg.foreign else 64
            setattr(bufs, arg.name, T.match_buffer(handle, shape, arg.dtype, align=align))
        with T.attr(0, "pragma_import_llvm", llvm.helpers(isa)):
            body(em, bufs, tokens, threads)
    return Kernel(symbol, args, ib.get())


@contextmanager
def loop(extent: Any, start: Any = 0) -> Iterator[Any]:
    """A serial int64 loop over [start, extent)."""
    begin = i64(start) if isinstance(start, int) else start
    end = i64(extent) if isinstance(extent, int) else extent
    with T.serial(begin, end) as index:
        yield index


@contextmanager
def parallel(count: Any) -> Iterator[Any]:
    """A parallel int64 loop over [0, count)."""
    with T.parallel(i64(0), count) as index:
        yield index


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Statements under a condition."""
    with T.If(condition), T.Then():
        yield


@contextmanager
def chunk(total: Any, threads: Any) -> Iterator[tuple[Any, Any]]:
    """Split [0, total) into `threads` contiguous parts, one a task: yields (begin, end)."""
    with parallel(threads) as part:
        begin = T.bind(tirx.floordiv(total * part, threads))
        end = T.bind(tirx.floordiv(total * (part + 1), threads))
        yield begin, end


def scalar(dtype: str, value: Any) -> Any:
    """A mutable local of one element, initialised."""
    local = T.alloc_buffer((1,), dtype)
    T.buffer_store(local, value, [0])
    return local
