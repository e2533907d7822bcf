"""Small costs on the CPU: routing and sorting alone, and what a call costs beside its kernels.

    python bench/cpu_small.py

One thread; the least of many batches of calls, which other processes disturb less than the
median. "routing" is softmax, top-k and sort from given logits, beside torch's own functions;
"call" is the time of a Python call less that of the compiled function within it.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cpu_layers import LAYERS, write_checkpoint

import moec
from moec.artifact import aligned
from moec.runtime import abi
from moec.runtime.libraries import Library, open_library, runtime
from moec.runtime.pool import use_workers
from moec.runtime.tensors import address
from moec.schedules.cpu import codegen, route, sort
from moec.schedules.cpu.isa import ISAS
from moec.spec import RouterSpec
from moec.target import resolve

_ROUTED = ((128, 8), (64, 8))
_TOKENS = (1, 2048)
_BATCHES = 15


def microseconds(call: Callable[[], Any], count: int) -> float:
    """The mean of `count` calls in the fastest batch."""
    times = []
    for _ in range(_BATCHES):
        start = time.thread_time()
        for _ in range(count):
            call()
        times.append(time.thread_time() - start)
    return min(times) / count * 1e6


def routing(folder: Path) -> list[dict[str, Any]]:
    """Softmax, top-k and sort for several layers and T."""
    import torch

    target = resolve("cpu")
    isa = ISAS[target.isa]
    rows = []
    for experts, top_k in _ROUTED:
        spec = RouterSpec(experts, top_k)
        kernels = (
            route.route("route", isa, spec, "float32", experts),
            sort.sort("sort", isa, experts, top_k),
        )
        path = folder / f"route{experts}.so"
        codegen.build({k.symbol: k.func for k in kernels}, target, path)
        library = open_library(path)
        for tokens in _TOKENS:
            buffers = {"logits": aligned((tokens, experts), "float32")}
            given = np.random.default_rng(0).standard_normal(buffers["logits"].shape)
            buffers["logits"][:] = given
            frames = [_frame(library, kernel, tokens, buffers) for kernel in kernels]
            use_workers(1)

            def ours(frames: Any = frames) -> None:
                for frame in frames:
                    frame.call()

            logits = torch.from_numpy(given.astype(np.float32))

            def theirs(logits: Any = logits, experts: int = experts, top_k: int = top_k) -> None:
                _, ids = logits.softmax(-1).topk(top_k)
                flat = ids.flatten()
                flat.sort(stable=True)
                torch.bincount(flat, minlength=experts).cumsum(0)

            count = 2000 if tokens == 1 else 20
            for name, call in (("moec", ours), ("torch", theirs)):
                rows.append({"what": "routing", "experts": experts, "tokens": tokens,
                             "name": name, "microseconds": round(microseconds(call, count), 2)}
                            )  # fmt: skip
    return rows


def _frame(library: Library, kernel: Any, tokens: int, buffers: dict[str, Any]) -> abi.Frame:
    """The call of one kernel; buffers of the same name are shared."""
    arrays = []
    for arg in kernel.args:
        shape = tuple(d if isinstance(d, int) else d.count * tokens for d in arg.shape)
        if arg.name not in buffers:
            buffers[arg.name] = aligned(shape, arg.dtype)
        arrays.append(buffers[arg.name])
    dims = [abi.dims(a.shape) for a in arrays]
    tensors = [abi.tensor(d, a.dtype.name, address(a)) for d, a in zip(dims, arrays, strict=True)]
    return abi.Frame(
        runtime(), library.function(kernel.symbol), tensors, [tokens, 1], (dims, arrays)
    )


def overhead(folder: Path) -> list[dict[str, Any]]:
    """What a Python call costs beside the compiled function, on a layer that is next to nothing."""
    import torch

    LAYERS["mini"] = (2, 1, 64, 32)
    write_checkpoint(folder, "mini", "float32")
    moec.compile(folder, out=folder / "mini.moec")
    block = moec.load(folder / "mini.moec", threads=1)[0]
    x, ids = np.ones((1, 64), np.float32), np.zeros((1, 1), np.int32)
    weights = np.ones((1, 1), np.float32)
    rows, inside, keep = [], {}, []
    for kind, convert in (("NumPy", lambda a: a), ("torch", torch.from_numpy)):
        tensors = [convert(a) for a in (x, ids, weights)]
        keep.append(convert(np.empty_like(x)))
        out = keep[-1]
        for function, run, given in (
            ("moe", block, tensors[:1]),
            ("experts", block.experts, tensors),
        ):
            run(*given, out)  # a frame then points to these arrays, which stay
            if function not in inside:
                call = block._calls[function]
                inside[function] = microseconds(call._ready(call._choose(1, None)).call, 3000)
            for name, more in (("", ()), (", out given", (out,))):
                spent = microseconds(partial(run, *given, *more), 3000) - inside[function]
                rows.append({"what": "call", "name": f"{function}, {kind}{name}",
                             "microseconds": round(spent, 2)})  # fmt: skip
    return rows


def measure() -> list[dict[str, Any]]:
    """All rows."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        return [*routing(Path(name)), *overhead(Path(name))]


if __name__ == "__main__":
    for row in measure():
        print(json.dumps(row))
