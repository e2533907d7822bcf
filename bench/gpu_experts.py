"""Check and time compiled expert kernels on this GPU: the libraries that build_experts.py made.

    python bench/gpu_experts.py LIBS [--shapes qwen3] [--T 1,2,4] [--variants REGEX] [--json FILE]

Every variant runs at every T of its range on random, uneven, single-expert and partly absent
routings, from poisoned memory, against float32; --runs N (3) runs must agree bitwise. Times are
medians of CUDA-graph replays over R routings, so that weights come from HBM. A crash costs
one variant: the work runs in a child process that is started again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from compact_weights import pack

TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192,16384"
LIMIT = 5e-3  # bf16 rounds h and y (2^-9 each, relative) and the rows of a sum; peers: 4.5e-3
WARM = 5  # batches of 20 ms before those that count
POISON = 0xFF  # bytes of NaN in bf16, f16 and f32


class Entries:
    """The functions of one compiled library, called on torch tensors."""

    def __init__(self, path: Path, device: int = 0) -> None:
        import torch

        from moec.runtime import abi, cuda
        from moec.runtime.libraries import open_library, runtime

        cuda.prepare()
        self._torch, self._abi, self._cuda, self._device = torch, abi, cuda, device
        self._ffi, self._library = runtime(), open_library(path)

    def bind(self, symbol: str, tensors: list[Any]) -> Any:
        """A function of no arguments that runs `symbol` on the current stream."""
        abi, cuda, torch = self._abi, self._cuda, self._torch
        keep, raw = [tensors], []
        for tensor in tensors:
            dims = abi.dims(tuple(tensor.shape))
            keep.append(dims)
            code, bits = abi.TYPES[str(tensor.dtype).removeprefix("torch.")]
            raw.append(
                abi.DLTensor(
                    tensor.data_ptr(),
                    cuda.DEVICE_TYPE,
                    self._device,
                    len(dims),
                    code,
                    bits,
                    1,
                    ctypes.addressof(dims),
                    None,
                    0,
                )
            )
        frame = abi.Frame(self._ffi, self._library.function(symbol), raw, [1], keep)

        def call() -> None:
            cuda.use_stream(self._device, torch.cuda.current_stream().cuda_stream)
            frame.call()

        return call


def routing(torch: Any, T: int, E: int, K: int, kind: str, seed: int) -> tuple[Any, Any]:
    """(ids int32 [T, K], weights f32 [T, K])."""
    gen = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(T, E, device="cuda", generator=gen)
    if kind == "uneven":
        logits += 3.0 * torch.randn(E, device="cuda", generator=gen)
    elif kind == "single":
        logits = torch.randn(1, E, device="cuda", generator=gen).expand(T, E)
    values, ids = logits.topk(K, dim=-1)
    ids = ids.to(torch.int32)
    if kind == "absent":
        ids = torch.where(torch.rand(T, K, device="cuda", generator=gen) < 0.3, -1, ids)
        ids[0, 0] = E + 5
    return ids.contiguous(), torch.softmax(values, -1).contiguous()


def reference(torch: Any, x: Any, gate_up: Any, down: Any, ids: Any, weights: Any) -> Any:
    """y float32 of a SwiGLU layer, one expert at a time."""
    inter = gate_up.shape[1] // 2
    y = torch.zeros(x.shape, device="cuda")
    for e in ids.unique().tolist():
        if not 0 <= e < gate_up.shape[0]:
            continue
        token, k = (ids == e).nonzero(as_tuple=True)
        gu = x[token].float() @ gate_up[e].float().T
        h = torch.nn.functional.silu(gu[:, :inter]) * gu[:, inter:]
        y.index_add_(0, token, (h @ down[e].float().T) * weights[token, k, None])
    return y


def work(options: argparse.Namespace) -> None:
    """The child: run what is left of the list and append results to the log."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    index = json.loads((options.libs / "index.json").read_text())
    jobs = json.loads(Path(options.work).read_text())
    shape = None
    for job in jobs:
        name, variant = job["shape"], job["variant"]
        if name != shape:
            shape = name
            E, K, H, I = index[name]["shape"]
            gen = torch.Generator("cuda").manual_seed(7)
            gate_up = torch.empty(E, 2 * I, H, device="cuda", dtype=torch.bfloat16)
            down = torch.empty(E, H, I, device="cuda", dtype=torch.bfloat16)
            for e in range(E):
                gate_up[e] = torch.randn(2 * I, H, device="cuda", generator=gen) * H**-0.5
                down[e] = torch.randn(H, I, device="cuda", generator=gen) * I**-0.5
            packed: list[Any] = []
            entries = Entries(options.libs / index[name]["library"])
            refs: dict[Any, Any] = {}
        info = index[name]["variants"][variant]
        weights = [gate_up, down]
        if info.get("form", "plain") == "compact":
            packed = packed or [pack(torch, gate_up, True), pack(torch, down, False)]
            weights = [*packed, *weights]
        for T in job["T"]:
            print(json.dumps({"begin": [name, variant, T]}), flush=True)
            record = one(torch, options, entries, info, refs, (E, K, H, I), T, weights)
            print(json.dumps({"shape": name, "variant": variant, "T": T, **record}), flush=True)


def one(
    torch: Any,
    options: Any,
    entries: Entries,
    info: dict[str, Any],
    refs: dict[Any, Any],
    dims: tuple[int, ...],
    T: int,
    weights: list[Any],
) -> dict[str, Any]:
    """Check, then time, one variant at one T: with the first of `weights`, by the last."""
    plain, used = weights[-2:], weights[:2]
    E, K, H, _ = dims
    fixed, per_token = info["workspace"]
    space = torch.empty(fixed + per_token * T + 256, device="cuda", dtype=torch.uint8)
    y = torch.empty(T, H, device="cuda", dtype=torch.bfloat16)
    record: dict[str, Any] = {"bad": []}
    worst = 0.0
    partial = "_upto" in info["symbol"]  # the first launches of a variant: timed, not checked
    for kind in () if partial else ("random", "uneven", "single", "absent"):
        if kind == "absent" and T == 1:
            continue
        key = (T, kind)
        if key not in refs:
            gen = torch.Generator("cuda").manual_seed(T)
            x = torch.randn(T, H, device="cuda", generator=gen).to(torch.bfloat16)
            ids, shares = routing(torch, T, E, K, kind, T)
            rows = torch.randperm(T, device="cuda", generator=gen)[:128]
            ref = reference(torch, x[rows], *plain, ids[rows], shares[rows])
            refs[key] = (x, ids, shares, rows, ref)
        x, ids, shares, rows, ref = refs[key]
        call = entries.bind(info["symbol"], [x, ids, shares, *used, y, space])
        first = None
        for _ in range(options.runs):
            space.fill_(POISON)
            y.view(torch.uint8).fill_(POISON)
            call()
            torch.cuda.synchronize()
            if first is None:
                first = y.clone()
                err = ((y[rows].float() - ref).norm() / ref.norm()).item()
                nan = int(torch.isnan(y).sum())
                if not err <= LIMIT or nan:
                    record["bad"].append(f"{kind}: err {err:.2e}, {nan} NaN")
                worst = max(worst, err if err == err else float("inf"))
            elif not torch.equal(first.view(torch.int16), y.view(torch.int16)):
                record["bad"].append(f"{kind}: not repeatable")
    record["err"] = worst
    if options.no_time:
        return record
    record["us"], record["spread"] = timed(torch, entries, info, dims, T, used, y, space)
    return record


def timed(
    torch: Any,
    entries: Entries,
    info: dict[str, Any],
    dims: tuple[int, ...],
    T: int,
    weights: list[Any],
    y: Any,
    space: Any,
) -> tuple[float, list[float]]:
    """Median time of a call in us over graph replays, and the least and most of the batches."""
    E, K, H, _ = dims
    R = 16 if T <= 64 else 8 if T <= 1024 else 4
    xs = [torch.randn(T, H, device="cuda").to(torch.bfloat16) for _ in range(R)]
    routes = [routing(torch, T, E, K, "random", 1000 + r) for r in range(R)]
    calls = [
        entries.bind(info["symbol"], [xs[r], *routes[r], *weights, y, space]) for r in range(R)
    ]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    batch = max(1, int(20.0 / max(begin.elapsed_time(end), 1e-3)))
    times = []
    for _ in range(WARM * batch):
        graph.replay()
    for _ in range(7):
        begin.record()
        for _ in range(batch):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / batch / R)
    times.sort()
    return times[3], [times[0], times[-1]]


def main() -> None:
    """Parent: hand out the work, collect the lines, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("libs", type=Path)
    parser.add_argument("--shapes", default="qwen3")
    parser.add_argument("--T", default=TOKENS)
    parser.add_argument("--variants", default=".")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--budget", type=float, default=500.0, help="seconds")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return
    index = json.loads((options.libs / "index.json").read_text())
    wanted = [int(t) for t in options.T.split(",")]
    jobs = []
    # One T after another, and its variants in turn: a chip that gets warm slows all of them alike.
    for shape in options.shapes.split(","):
        variants = index[shape]["variants"].items()
        for t in wanted:
            for variant, info in variants:
                low, high = info["tokens"]
                if low <= t < high and re.search(options.variants, variant):
                    jobs.append({"shape": shape, "variant": variant, "T": [t]})
    records = run(options, jobs)
    report(records)
    if options.json:
        options.json.write_text(json.dumps(records, indent=0))


def run(options: argparse.Namespace, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the jobs in children; a cell that kills its child is recorded as crashed."""
    records: list[dict[str, Any]] = []
    deadline = time.monotonic() + options.budget
    listing = Path("/tmp/moec-bench-work.json")
    while jobs and time.monotonic() < deadline:
        listing.write_text(json.dumps(jobs))
        child = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--work", str(listing)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert child.stdout is not None
        current, tail = None, []
        import threading

        timer = threading.Timer(max(1.0, deadline - time.monotonic()), child.kill)
        timer.start()
        for line in child.stdout:
            try:
                item = json.loads(line)
            except ValueError:
                tail.append(line.rstrip())
                continue
            if "begin" in item:
                current = item["begin"]
                watchdog = threading.Timer(60.0, child.kill)
                watchdog.start()
            else:
                watchdog.cancel()
                records.append(item)
                current = None
        child.wait()
        timer.cancel()
        done = {(r["shape"], r["variant"], r["T"]) for r in records}
        if current:
            watchdog.cancel()
            message = " | ".join(tail[-4:])[-500:]
            records.append(
                {
                    "shape": current[0],
                    "variant": current[1],
                    "T": current[2],
                    "bad": [f"crash {child.returncode}: {message}"],
                }
            )
            done.add(tuple(current))
        elif child.returncode:
            print("\n".join(tail[-15:]))
            break
        jobs = [
            {**j, "T": [t for t in j["T"] if (j["shape"], j["variant"], t) not in done]}
            for j in jobs
        ]
        jobs = [j for j in jobs if j["T"]]
    return records


def report(records: list[dict[str, Any]]) -> None:
    """A table on stdout: one line a variant, one column a T; then what is wrong."""
    for shape in dict.fromkeys(r["shape"] for r in records):
        mine = [r for r in records if r["shape"] == shape]
        tokens = sorted({r["T"] for r in mine})
        print(f"{shape} us".ljust(16) + "".join(f"{t:>9}" for t in tokens))
        for variant in dict.fromkeys(r["variant"] for r in mine):
            cells = {r["T"]: r for r in mine if r["variant"] == variant}
            line = variant.ljust(16)
            for t in tokens:
                r = cells.get(t)
                text = "" if r is None else f"{r.get('us', 0):.1f}" + ("!" if r["bad"] else "")
                line += f"{text:>9}"
            print(line)
        worst = max((r["err"] for r in mine if "err" in r), default=float("nan"))
        print(f"largest error {worst:.2e} of {LIMIT:.0e}")
        for r in mine:
            for bad in r["bad"][:3]:
                print("BAD", r["variant"], r["T"], bad)


if __name__ == "__main__":
    main()
