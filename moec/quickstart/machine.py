"""What this machine can do at best: read bandwidth and arithmetic peak, measured by our own loops.

Both loops are compiled by the same compiler for the same instruction set as the kernels, so
that a fraction of them says something about the kernels and not about the compiler.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import tvm_ffi
from tvm import tirx
from tvm.tirx.script import builder as T

from .. import host
from ..artifact import anonymous
from ..runtime.pool import use_workers
from ..schedules.buffers import Buf, Kernel, PerToken
from ..schedules.cpu.codegen import compile_module
from ..schedules.cpu.emit import Emit, i64
from ..schedules.cpu.isa import ISAS, Isa
from ..schedules.cpu.kernel import build, loop, parallel
from ..target import resolve

_READ_BYTES = 256 << 20  # several times the largest cache
_VECTORS = 8  # loaded and summed side by side, so that no addition waits for another
_STREAMS = (1, 4)  # places a thread reads at once: which is faster depends on the prefetcher
_ROUNDS = 1 << 21  # some milliseconds: waking the workers costs up to 0.2
_REPEATS = 5
_MOST_THREADS = 1024


@dataclass(frozen=True)
class Machine:
    """Bytes per second read from memory, and floating-point operations per second."""

    read: float
    flops: float
    threads: int

    def best(self, other: Machine) -> Machine:
        """The better of two measurements in each figure."""
        return Machine(max(self.read, other.read), max(self.flops, other.flops), self.threads)


def measure(weights_dtype: str, threads: int | None = None) -> Machine:
    """Measure this machine for weights of a dtype; default: all cores of the process."""
    loops = Loops(weights_dtype, threads)
    spent = min(map(_best, loops.reads))
    return Machine(loops.bytes / spent, loops.flops / _best(loops.peak), loops.threads)


class Loops:
    """The loops themselves: every one of `reads` reads `bytes`, `peak` does `flops` operations.

    Several reads differ in the number of places that a thread reads at once.
    """

    def __init__(self, weights_dtype: str, threads: int | None = None) -> None:
        target = resolve("cpu")
        isa = ISAS[target.isa]
        self.threads = min(threads or host.threads(), _MOST_THREADS)
        pairs = isa.bf16_dot and weights_dtype == "bfloat16"
        readers = [_read_kernel(isa, streams) for streams in _STREAMS]
        kernels = [*readers, _peak_kernel(isa, pairs)]
        module = compile_module({k.symbol: k.func for k in kernels}, target)
        memory = _shared(_memory(isa))
        sums = _shared(np.zeros((_MOST_THREADS, isa.lanes), np.float32))
        per_fma = 4 if pairs else 2
        self.bytes = _READ_BYTES
        self.flops = per_fma * isa.lanes * _accumulators(isa) * _ROUNDS * self.threads
        self.reads = [
            self._call(module[k.symbol], memory, sums, memory.shape[0], self.threads)
            for k in readers
        ]
        self.peak = self._call(module["peak"], sums, self.threads)

    def _call(self, function: Any, *args: Any) -> Callable[[], Any]:
        def run() -> None:
            # Left alone, TVM's pool has half of the cores, and the tasks of a loop would take
            # turns.
            use_workers(min(self.threads, host.cores()))
            function(*args)

        return run


def _memory(isa: Isa) -> Any:
    """Rows of ones on huge pages, which is how the runtime keeps the weights that it packs."""
    columns = isa.lanes * _VECTORS
    array = anonymous((_READ_BYTES // 4 // columns, columns), "float32")
    array[:] = 1.0
    return array


def _shared(array: Any) -> Any:
    return tvm_ffi.from_dlpack(array, require_alignment=4)


def _best(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _read_kernel(isa: Isa, streams: int) -> Kernel:
    """Every thread sums its own part of the memory, reading at `streams` places in turn."""
    args = (
        Buf("memory", (PerToken(), isa.lanes * _VECTORS), "float32", True),
        Buf("sums", (_MOST_THREADS, isa.lanes), "float32", True),
    )

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        with parallel(threads) as part:
            begin = T.bind(tirx.floordiv(tokens * part, threads))
            end = T.bind(tirx.floordiv(tokens * (part + 1), threads))
            length = T.bind(tirx.floordiv(end - begin, i64(streams)))
            total = T.alloc_buffer((_VECTORS,), em.f32v)
            for j in range(_VECTORS):
                T.buffer_store(total, em.splat(0.0), [j])
            with loop(length) as row:
                for stream, j in itertools.product(range(streams), range(_VECTORS)):
                    place = [begin + length * stream + row, i64(j * em.lanes)]
                    value = em.load(b.memory, place, "float32")
                    T.buffer_store(total, tirx.BufferLoad(total, [j]) + value, [j])
            result = tirx.BufferLoad(total, [0])
            for j in range(1, _VECTORS):
                result = result + tirx.BufferLoad(total, [j])
            em.store(b.sums, result, [part, i64(0)], "float32")

    return build(f"read_{streams}", isa, args, body)


def _accumulators(isa: Isa) -> int:
    # Two for each cycle of latency of two units; they and the operands must stay in registers.
    return 10


def _peak_kernel(isa: Isa, pairs: bool) -> Kernel:
    """Independent multiply-adds on registers."""
    args = (Buf("sums", (_MOST_THREADS, isa.lanes), "float32", True),)

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        count = _accumulators(isa)
        with parallel(threads) as part:
            acc = T.alloc_buffer((count,), em.f32v)
            start = em.bind(em.load(b.sums, [part, i64(0)], "float32"))
            for j in range(count):
                T.buffer_store(acc, start, [j])
            word = em.bind(T.reinterpret(em.i32v, start)) if pairs else start
            with loop(_ROUNDS):
                for j in range(count):
                    old = tirx.BufferLoad(acc, [j])
                    new = em.dot_bf16(old, word, word) if pairs else em.fma(old, word, word)
                    T.buffer_store(acc, new, [j])
            result = tirx.BufferLoad(acc, [0])
            for j in range(1, count):
                result = result + tirx.BufferLoad(acc, [j])
            em.store(b.sums, result, [part, i64(0)], "float32")

    return build("peak", isa, args, body)
