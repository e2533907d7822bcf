"""Time whole blocks on a GPU by function and schedule, with random weights made there.

    python bench/gpu_block.py make OUT     # here: one library a shape, no weights
    python bench/gpu_block.py run OUT      # on the GPU machine: needs torch, no compiler

`route` is the router's matmul and the selection, `experts` the rest without shared experts,
`moe` all of it. Medians of CUDA-graph replays; weights that fit the L2 are read from there,
as in a model whose layers do not fit it they would not be: a router's are.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TOKENS = (1, 4, 8, 16, 64, 256, 1024, 4096, 16384)
NAMES = ("gather", "stream16", "stream64", "stream160", "mma16", "mma64")
BYTES = {"float32": 4, "bfloat16": 2, "int32": 4}


def specs() -> dict[str, Any]:
    """Blocks by name: Qwen3-30B-A3B, and DeepSeek-V3 with a quarter of its experts."""
    from moec.spec import (
        ExpertsSpec,
        GroupSpec,
        MoESpec,
        Renorm,
        RouterSpec,
        Score,
        SharedExpertSpec,
    )

    deepseek = RouterSpec(64, 8, score=Score.SIGMOID, selection_bias=True, renorm=Renorm.SUM,
                          groups=GroupSpec(8, 4), scale=2.5)  # fmt: skip
    return {
        "qwen3": MoESpec("bfloat16", RouterSpec(128, 8, renorm=Renorm.SUM),
                         ExpertsSpec(128, 8, 2048, 768)),
        "deepseek/4": MoESpec("bfloat16", deepseek, ExpertsSpec(64, 8, 7168, 2048),
                              SharedExpertSpec(2048)),
    }  # fmt: skip


def make(out: Path) -> None:
    """Compile every block for sm_90a; index.json says how its functions are called."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from moec import target
    from moec.compiler.instruments import Observer
    from moec.compiler.lower import lower, ports
    from moec.compiler.options import CompileOptions
    from moec.schedules import backend, choose
    from moec.schedules.buffers import PerToken

    out.mkdir(parents=True, exist_ok=True)
    hopper, own, index = target.resolve("cuda:sm_90a"), backend("cuda"), {}
    for number, (name, spec) in enumerate(specs().items()):
        names = tuple(n for n in NAMES if own.schedules[n].supports(spec, hopper) is None)
        made = lower("b", spec, hopper, own, choose(own, names, spec, hopper),
                     Observer(CompileOptions()), None)  # fmt: skip
        own.build(made.functions, hopper, out / f"{number}.so")
        shapes = {
            n: [[-d.count if isinstance(d, PerToken) else d for d in b.shape], b.dtype]
            for n, b in ports(spec).items()
        }
        for n, p in made.packed.items():
            shapes[n] = [list(p.shape), p.dtype]
        calls = {
            f"{function} {v.schedule.name}": {
                "symbol": v.entry.symbol,
                "arguments": [*v.entry.inputs, *v.entry.parameters, *v.entry.outputs],
                "workspace": v.entry.workspace,
                "kernels": v.entry.kernels,
            }
            for function, variants in made.variants.items()
            for v in variants
        }
        experts = spec.experts.num_experts
        index[name] = {"library": f"{number}.so", "shapes": shapes, "calls": calls, "E": experts}
        print(name, ", ".join(names), flush=True)
    (out / "index.json").write_text(json.dumps(index))


def run(out: Path) -> None:
    """Print microseconds by function and schedule (rows) and T (columns)."""
    import torch
    from gpu_experts import Entries

    for name, block in json.loads((out / "index.json").read_text()).items():
        entries = Entries(out / block["library"])
        fixed = {
            n: _random(torch, shape, dtype, 0, block["E"])
            for n, (shape, dtype) in block["shapes"].items() if min(shape) > 0
        }  # fmt: skip
        print(f"{name} us".ljust(24) + "".join(f"{t:>10}" for t in TOKENS))
        seen = set()
        for label, call in block["calls"].items():
            if call["symbol"] in seen:
                continue  # the same kernels as in another schedule
            seen.add(call["symbol"])
            line = label.ljust(24)
            for tokens in TOKENS:
                function, schedule = label.split()
                most = {"gather": 8, "stream16": 1024, "mma16": 1024}.get(schedule, tokens)
                if function == "route":
                    most = max(most, 1024)
                cell = (
                    ""
                    if tokens > most
                    else f"{_time(torch, entries, block, call, fixed, tokens):.1f}"
                )
                line += f"{cell:>10}"
            print(line, flush=True)
        del fixed


def _random(torch: Any, shape: list[int], dtype: str, tokens: int, experts: int) -> Any:
    dims = [-d * tokens if d < 0 else d for d in shape]
    if dtype == "int32":
        return torch.randint(0, experts, dims, device="cuda", dtype=torch.int32)
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    out = torch.empty(dims, device="cuda", dtype=kind)
    for part in out if out.dim() == 3 else [out]:
        part.copy_(torch.randn(part.shape, device="cuda") * dims[-1] ** -0.5)
    return out


def _time(torch: Any, entries: Any, block: Any, call: Any, fixed: Any, tokens: int) -> float:
    shapes = block["shapes"]
    own = {n: _random(torch, *shapes[n], tokens, block["E"])
           for n in call["arguments"] if n not in fixed}  # fmt: skip
    constant, each = call["workspace"]
    space = torch.empty(constant + each * tokens + 512, device="cuda", dtype=torch.uint8)
    tensors = [*({**fixed, **own}[n] for n in call["arguments"]), space]
    run_ = entries.bind(call["symbol"], tensors)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run_()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(8):
                run_()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / 8)
    return sorted(times)[3]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("make", "run"))
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    (make if options.verb == "make" else run)(options.out)


if __name__ == "__main__":
    main()
