"""Host time of a call on a GPU without a graph: what Python and the launches cost the caller.

    python bench/gpu_overhead.py CASES        # made by `python -m tests.gpu.make CASES`

Calls are issued back to back into an idle stream, as many as the launch queue takes without
waiting, and the host clock is read before the GPU is waited for. Medians of rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

CALLS, ROUNDS = 50, 21


def per_call(torch: Any, call: Any) -> float:
    """Microseconds of host time a call."""
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - begin) / CALLS * 1e6)
        torch.cuda.synchronize()
    return statistics.median(times)


def native(torch: Any, block: Any, tensors: list[Any]) -> Any:
    """What `experts` comes down to: the compiled function, checks of its arguments, launches."""
    call = block._calls["experts"]
    tokens = len(tensors[0])
    ready = call._ready(call._choose(tokens, None))
    ready.fill(tokens, [tensor.data_ptr() for tensor in tensors])
    space = torch.empty(1 << 24, dtype=torch.uint8, device="cuda")
    ready.space.data = space.data_ptr()

    def run() -> Any:
        ready.call()
        return space, tensors

    return run


def main() -> None:
    """Print a table: one line a function and T, with the launches of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch

    import moec

    block = moec.load(options.cases / "hopper.moec", device="cuda:0")[0]
    e = block.spec.experts
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: host us a call")
    for tokens in (1, 8, 64, 512):
        x = torch.randn(tokens, e.hidden_size, device="cuda").bfloat16()
        ids, weights = block.route(x)
        out = torch.empty_like(x)
        rows = {
            "experts, out=": lambda: block.experts(x, ids, weights, out=out),  # noqa: B023
            "experts": lambda: block.experts(x, ids, weights),  # noqa: B023
            "moe, out=": lambda: block(x, out=out),  # noqa: B023
            "torch.mul, out=": lambda: torch.mul(x, x, out=out),  # noqa: B023
        }
        rows["  of which native"] = native(torch, block, [x, ids, weights, out])
        for name, call in rows.items():
            print(f"T={tokens:<5} {name:<17} {per_call(torch, call):6.1f}")


if __name__ == "__main__":
    main()
