"""The child of bench/cpu.py: one layer, dtype and number of threads, at every T.

    python bench/cpu_cell.py FOLDER ARGUMENTS_AS_JSON

FOLDER holds the checkpoint and the artifact `layer.moec`. Prints one JSON row a line. A process
of its own, because the number of threads and the size of pages are those of a process.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from cpu_layers import LAYERS, Inputs, canonical
from cpu_peers import Candidate, open_peers

import moec
from moec.quickstart.machine import Loops

# Seconds before each candidate. Measured on two threads: those of ONNX Runtime spin for 20 to 50 ms
# after a call, torch's for 5 to 20 ms, ggml's (see cpu_peers) and OpenVINO's for less than 5 ms,
# moec's for 0.1 ms; after 50 ms no candidate uses any core.
REST = 0.06
FLUSHED = 4  # the largest T before whose calls the caches are flushed: they would hold weights
_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
READ, PEAK = "read", "peak"


def wide(result: Any) -> np.ndarray:
    if isinstance(result, np.ndarray):
        return result.astype(np.float64)
    return np.asarray(result.float().numpy(), np.float64)


class Times:
    """Seconds by name, and the clock that they are taken with."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.table = clock, dict[str, list[float]]()

    def take(self, name: str, call: Callable[[], Any]) -> None:
        start = self.clock()
        call()
        self.table.setdefault(name, []).append(self.clock() - start)

    def median(self, name: str) -> float:
        return statistics.median(self.table[name])

    def best(self, prefix: str) -> float:
        """The smallest median among the names that start so."""
        return min(self.median(name) for name in self.table if name.startswith(prefix))


def machine(times: Times, loops: Loops, flush_only: bool = False) -> None:
    """One reading of every loop; the reads also flush the caches."""
    for number, read in enumerate(loops.reads):
        times.take(f"{READ} {number}", read)
    if not flush_only:
        times.take(PEAK, loops.peak)


def run(
    table: dict[str, Candidate], sets: int, rounds: int, loops: Loops, args: SimpleNamespace, t: int
) -> Times:
    """Times over rounds that take each candidate and the machine's loops in turn."""
    times, order = Times(_CLOCKS[args.clock]), random.Random(t)
    for call in table.values():  # or the first candidate would pay for pages not touched yet
        for number in range(sets):
            call(number)
    for number in range(rounds):
        time.sleep(REST)
        machine(times, loops)
        # In another order each time: who comes first, or after whom, may matter.
        for name, call in order.sample(list(table.items()), len(table)):
            # Until the threads of the candidate before, which spin for a while, are asleep:
            # those of ONNX Runtime doubled the time of whoever came next.
            time.sleep(REST)
            if t <= FLUSHED:
                machine(times, loops, flush_only=True)
            times.take(name, partial(call, number % sets))
    return times


def check(table: dict[str, Candidate], dtype: str) -> None:
    """Every candidate agrees with the first one, which is moec's."""
    results = {name: wide(call(0)) for name, call in table.items()}
    first = next(iter(results))
    # bfloat16 peers round every intermediate: some roundings of 2^-9.
    limit = 1e-4 if dtype == "float32" else 2e-2
    for name, result in results.items():
        error = float(np.linalg.norm(result - results[first]) / np.linalg.norm(results[first]))
        if not error <= limit:
            raise SystemExit(f"{name} differs from {first}: {error}")


def cell(args: SimpleNamespace, block: Any, peers: list[Any], loops: Loops, tokens: int) -> None:
    """Check and time every candidate at one T; prints a row for each."""
    sets = 4 if tokens <= 128 else 1
    inputs = Inputs(args.layer, args.dtype, tokens, sets)

    def ours(schedule: str) -> Candidate:
        return lambda i: block.experts(
            inputs.x[i], inputs.ids[i], inputs.weights[i], schedule=schedule
        )

    table = {f"moec {s}": ours(s) for s in block.schedules("experts") if args.fits(s, tokens)}
    table |= {peer.name: call for peer in peers if (call := peer.at(inputs)) is not None}
    check(table, args.dtype)
    start = time.perf_counter()
    once = run(table, sets, 1, loops, args, tokens)
    spent = time.perf_counter() - start
    # A candidate that takes most of the time is timed once, not in every round.
    slow = {n for n in table if once.median(n) > args.seconds / 4 and not n.startswith("moec")}
    spent -= sum(once.median(name) * (1 + sets) for name in slow)
    rounds = max(3, min(200, int(args.seconds / spent)))
    quick = {name: call for name, call in table.items() if name not in slow}
    times = run(quick, sets, rounds, loops, args, tokens)
    times.table |= {name: once.table[name] for name in slow}
    best = times.best("moec")
    _, top_k, hidden, inner = LAYERS[args.layer]
    size = 3 * hidden * inner
    width = 4 if args.dtype == "float32" else 2
    read = loops.bytes / times.best(READ)
    peak = loops.flops / times.best(PEAK)
    for name in table:
        spent = times.median(name)
        row = {
            "layer": args.layer,
            "dtype": args.dtype,
            "threads": args.threads,
            "pages": args.pages,
            "tokens": tokens,
            "name": name,
            "milliseconds": round(spent * 1e3, 3),
            "ratio": round(spent / best, 3),
            "of_read": round(inputs.active * size * width / spent / read, 3),
            "of_peak": round(2.0 * tokens * top_k * size / spent / peak, 3),
            "read": round(read / 1e9, 2),
            "peak": round(peak / 1e9, 1),
            "fastest_milliseconds": round(min(times.table[name]) * 1e3, 3),
            "rounds": len(times.table[name]),
        }
        print(json.dumps(row), flush=True)


def huge() -> float:
    """The share of this process's anonymous memory that is on huge pages."""
    sizes = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, size, *_ = line.split()
        sizes[name] = int(size)
    return sizes["AnonHugePages:"] / sizes["Anonymous:"]


def main() -> int:
    folder, args = Path(sys.argv[1]), SimpleNamespace(**json.loads(sys.argv[2]))
    # transformers' way of one expert at a time is moec's loop: nobody decodes with it.
    args.fits = lambda schedule, tokens: schedule != "gather" or tokens <= 32
    import torch

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    path = folder / "layer.moec"
    block = moec.load(path, threads=args.threads, verify="library", memory="copy")[0]
    ggml = Path(args.ggml) if args.ggml else None
    weights = canonical(folder, args.layer, args.dtype)
    peers = open_peers(args.peers, args.layer, weights, args.threads, ggml)
    loops = Loops(args.dtype, args.threads)
    for tokens in args.tokens:
        cell(args, block, peers, loops, tokens)
    if Path("/proc/self/smaps_rollup").exists():
        print(f"anonymous memory on huge pages: {huge():.0%}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
