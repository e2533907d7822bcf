"""A compiled block beside torch's own thread pool, and callers beside each other, on the CPU.

    python bench/cpu_threads.py [--seconds 2]

"in turns": a torch matmul and the block, one after the other in one thread, against each of them
alone: what the idle workers of one pool cost the other. "callers": Python threads that each call
the block, against one thread with the same cores; a number above 1 is faster than that one. All
pools have as many threads as the process has cores, which is the default of both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_layers import LAYERS, write_checkpoint

import moec
from moec import host

_LAYER = (32, 4, 1024, 512)  # E, K, H, I
_TOKENS = (1, 16, 128)


def _in_turns(calls: list[Callable[[], Any]], seconds: float) -> list[float]:
    """Medians, in milliseconds, of calls that take turns."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for own, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call()
            own.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(own) for own in times]


def _together(call: Callable[[], Any], callers: int, seconds: float) -> float:
    """Calls a millisecond of so many threads."""
    counts = [0] * callers
    gate = threading.Barrier(callers + 1)

    def work(number: int) -> None:
        call()
        gate.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            call()
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(callers)]
    for thread in threads:
        thread.start()
    gate.wait()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds / 1e3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    seconds = parser.parse_args().seconds
    cores = host.cores()
    torch.set_num_threads(cores)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        LAYERS["middle"] = _LAYER
        write_checkpoint(folder, "middle", "float32")
        moec.compile(folder, out=folder / "middle.moec")
        whole = moec.load(folder / "middle.moec", threads=cores)[0]
        single = moec.load(folder / "middle.moec", threads=1)[0]
        print(f"{cores} cores, E K H I = {_LAYER}, float32, milliseconds")
        for tokens in _TOKENS:
            x = torch.randn(tokens, _LAYER[2])
            weight = torch.randn(_LAYER[2], 4 * _LAYER[2])

            def matmul(x: Any = x, weight: Any = weight) -> Any:
                return x @ weight

            def block(x: Any = x) -> Any:
                return whole(x)

            def alone(x: Any = x) -> Any:
                return single(x)

            block(), alone(), matmul()
            (own,), (other,) = _in_turns([block], seconds), _in_turns([matmul], seconds)
            mixed, other_mixed = _in_turns([block, matmul], seconds)
            print(
                f"T = {tokens:3}  block alone {own:6.3f}  in turns {mixed:6.3f} "
                f"({mixed / own:4.2f})   matmul alone {other:6.3f}  in turns {other_mixed:6.3f} "
                f"({other_mixed / other:4.2f})"
            )
            one = _together(block, 1, seconds)
            split = _together(alone, cores, seconds) / one
            crowded = _together(block, cores, seconds) / one
            print(
                f"          {cores} callers: of one thread each {split:4.2f}, of {cores} threads "
                f"each {crowded:4.2f} of one caller's rate with {cores} threads"
            )


if __name__ == "__main__":
    main()
