"""The experts of one layer on the CPU, side by side with peers in one process.

    python bench/cpu.py --layer olmoe --dtype bfloat16 --tokens 1,4,32,128,512 --threads 2

Every round runs each candidate once, in turn, on the same inputs and the same weights, so that
all of them meet the same state of the machine; for T <= 4 a read of 256 MB flushes the caches
before each call. Reported: the median, the ratio of every peer to the best schedule of moec
(above 1: moec is faster), and fractions of the read bandwidth and of the arithmetic peak
measured in the same run. Outputs are compared with moec's before anything is timed. Peers are
transformers' experts (eager, grouped_mm, batched_mm) and, in float32 only, ONNX Runtime's MoE
(onnxruntime), which selects the experts itself from logits that leave it no choice.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import moec
from moec import host
from moec.quickstart.machine import measure

# name -> (E, K, H, I); mixtral with half its width, so that it fits beside its peers.
LAYERS = {
    "qwen3": (128, 8, 2048, 768),
    "olmoe": (64, 8, 2048, 1024),
    "mixtral": (8, 2, 4096, 7168),
    "tiny": (16, 4, 256, 128),
}
NUMPY = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
FLUSH_BYTES = 256 << 20
REST = 0.05  # seconds
Candidate = Callable[[int], Any]


def write_checkpoint(folder: Path, layer: str, dtype: str) -> None:
    """One OLMoE-shaped layer of random weights, one tensor per expert."""
    experts, top_k, hidden, inner = LAYERS[layer]
    config = {
        "model_type": "olmoe",
        "dtype": dtype,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)

    def tensor(*shape: int) -> np.ndarray:
        values = random.standard_normal(shape, np.float32) * np.float32(0.03)
        return values.astype(NUMPY[dtype])

    tensors = {"model.layers.0.mlp.gate.weight": tensor(experts, hidden)}
    for e in range(experts):
        prefix = f"model.layers.0.mlp.experts.{e}"
        tensors[f"{prefix}.gate_proj.weight"] = tensor(inner, hidden)
        tensors[f"{prefix}.up_proj.weight"] = tensor(inner, hidden)
        tensors[f"{prefix}.down_proj.weight"] = tensor(hidden, inner)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def canonical(folder: Path, layer: str) -> tuple[Any, Any]:
    """gate_up [E, 2I, H] and down [E, H, I] as torch tensors."""
    import torch
    from safetensors.torch import load_file

    experts, _, hidden, inner = LAYERS[layer]
    stored = load_file(folder / "model.safetensors")
    first = stored["model.layers.0.mlp.experts.0.gate_proj.weight"]
    gate_up = torch.empty((experts, 2 * inner, hidden), dtype=first.dtype)
    down = torch.empty((experts, hidden, inner), dtype=first.dtype)
    for e in range(experts):
        prefix = f"model.layers.0.mlp.experts.{e}"
        gate_up[e, :inner] = stored[f"{prefix}.gate_proj.weight"]
        gate_up[e, inner:] = stored[f"{prefix}.up_proj.weight"]
        down[e] = stored[f"{prefix}.down_proj.weight"]
    return gate_up, down


def transformers_peers(folder: Path, layer: str, names: list[str]) -> dict[str, Any]:
    """transformers' own experts module, with each of its implementations."""
    import torch
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    experts, top_k, hidden, inner = LAYERS[layer]
    gate_up, down = canonical(folder, layer)
    made = {}
    for name in names:
        config = OlmoeConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_experts=experts,
            num_experts_per_tok=top_k,
        )
        config._experts_implementation = name
        with torch.device("meta"):
            module = OlmoeExperts(config)
        module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(down, requires_grad=False)
        made[f"transformers {name}"] = module
    return made


def onnx_session(folder: Path, layer: str, threads: int) -> Any:
    """ONNX Runtime's com.microsoft.MoE in float32, its weights as constants that it may pack."""
    import onnxruntime
    from onnx import TensorProto, helper

    experts, top_k, hidden, _ = LAYERS[layer]
    gate_up, down = (tensor.numpy() for tensor in canonical(folder, layer))
    # Gate and up rows in turn: the layout of its fused swiglu, which here is silu(gate) * up.
    gate, up = np.split(gate_up, 2, axis=1)
    constants = {"fc1": np.stack([gate, up], 2).reshape(gate_up.shape), "fc2": down}
    operands = ["input", "router_probs", "fc1", "", "fc2"]
    node = helper.make_node(
        "MoE", operands, ["y"], domain="com.microsoft", k=top_k, activation_type="swiglu",
        swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0, swiglu_limit=1e30,
        normalize_routing_weights=1,
    )  # fmt: skip
    tokens = "tokens"
    graph = helper.make_graph(
        [node],
        "moe",
        [
            helper.make_tensor_value_info("input", TensorProto.FLOAT, [tokens, hidden]),
            helper.make_tensor_value_info("router_probs", TensorProto.FLOAT, [tokens, experts]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, hidden])],
    )
    for name, array in constants.items():
        tensor = graph.initializer.add()
        tensor.name, tensor.data_type = name, TensorProto.FLOAT
        tensor.dims.extend(array.shape)
        # Handed over below: a model file cannot hold more than 2 GB.
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="handed-over")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a))
              for a in constants.values()]  # fmt: skip
    options.add_external_initializers(list(constants), values)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class Inputs:
    """Random tokens and routings, several sets in turn."""

    def __init__(self, layer: str, dtype: str, tokens: int, count: int) -> None:
        experts, top_k, hidden, _ = LAYERS[layer]
        random = np.random.default_rng(tokens)
        self.x = [
            random.standard_normal((tokens, hidden)).astype(NUMPY[dtype]) for _ in range(count)
        ]
        self.ids = [
            np.stack([random.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
            for _ in range(count)
        ]
        # They sum to 1 for each token: ONNX Runtime takes logits and normalises.
        raw = [random.random((tokens, top_k)).astype(np.float32) + 0.1 for _ in range(count)]
        self.weights = [w / w.sum(axis=1, keepdims=True) for w in raw]
        self.logits = [np.full((tokens, experts), -1e4, np.float32) for _ in range(count)]
        for logits, ids, weights in zip(self.logits, self.ids, self.weights, strict=True):
            np.put_along_axis(logits, ids.astype(np.int64), np.log(weights), axis=1)
        self.active = float(np.mean([np.unique(ids).size for ids in self.ids]))


def candidates(block: Any, peers: dict[str, Any], inputs: Inputs) -> dict[str, Candidate]:
    """name -> function of the number of the input set."""
    import torch

    def ours(schedule: str) -> Candidate:
        return lambda i: block.experts(
            inputs.x[i], inputs.ids[i], inputs.weights[i], schedule=schedule
        )

    table: dict[str, Candidate] = {f"moec {s}": ours(s) for s in block.schedules("experts")}
    bf16 = inputs.x[0].dtype == ml_dtypes.bfloat16
    xs = [
        torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16) if bf16 else torch.from_numpy(x)
        for x in inputs.x
    ]
    ids = [torch.from_numpy(i).long() for i in inputs.ids]
    weights = [torch.from_numpy(w).to(xs[0].dtype) for w in inputs.weights]

    def theirs(module: Any) -> Candidate:
        if not isinstance(module, torch.nn.Module):  # an InferenceSession
            feeds = [
                {"input": x, "router_probs": logits}
                for x, logits in zip(inputs.x, inputs.logits, strict=True)
            ]
            return lambda i: module.run(None, feeds[i])[0]
        return lambda i: module(xs[i], ids[i], weights[i])

    return {**table, **{name: theirs(module) for name, module in peers.items()}}


def wide(result: Any) -> np.ndarray:
    if isinstance(result, np.ndarray):
        return result.astype(np.float64)
    return np.asarray(result.float().numpy(), np.float64)


def run(
    table: dict[str, Candidate], sets: int, rounds: int, flush: Callable[[], Any] | None
) -> dict[str, float]:
    """Median seconds of every candidate, over rounds that take each of them in turn."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in table}
    with torch.no_grad():
        for call in table.values():
            call(0)
        for number in range(rounds):
            for name, call in table.items():
                # Until the threads of the candidate before, which spin for a while, are asleep:
                # those of ONNX Runtime doubled the time of whoever came next.
                time.sleep(REST)
                if flush:
                    flush()
                start = time.perf_counter()
                call(number % sets)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", default="olmoe", choices=LAYERS)
    parser.add_argument("--dtype", default="bfloat16", choices=NUMPY)
    parser.add_argument("--tokens", default="1,4,32,128,512")
    parser.add_argument("--threads", type=int, default=host.cores())
    parser.add_argument("--peers", default="eager,grouped_mm,onnxruntime")
    parser.add_argument("--schedules", default="fused,gather,loop")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each T, about")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        write_checkpoint(folder, args.layer, args.dtype)
        report = moec.compile(
            folder, out=folder / "layer.moec", schedules=args.schedules.split(",")
        )
        print("compile:", {k: round(v, 2) for k, v in report.seconds.items()}, file=sys.stderr)
        block = moec.load(folder / "layer.moec", threads=args.threads, verify="library")[0]
        names = [p for p in args.peers.split(",") if p]
        peers = transformers_peers(folder, args.layer, [p for p in names if p != "onnxruntime"])
        if "onnxruntime" in names and args.dtype == "float32":
            peers["onnxruntime MoE"] = onnx_session(folder, args.layer, args.threads)
        machine = measure(args.dtype, args.threads)
        print(f"read {machine.read / 1e9:.1f} GB/s, peak {machine.flops / 1e9:.0f} GFLOP/s")
        memory = np.ones(FLUSH_BYTES // 8)
        for tokens in map(int, args.tokens.split(",")):
            rows += cell(args, block, peers, tokens, machine, lambda: memory.sum())
    if args.json:
        write_results(args, rows, machine)
    return 0


def cell(
    args: argparse.Namespace,
    block: Any,
    peers: dict[str, Any],
    tokens: int,
    machine: Any,
    flush: Callable[[], Any],
) -> list[dict[str, Any]]:
    """Check and time every candidate at one T; prints a line for each."""
    sets = 4 if tokens <= 128 else 1
    inputs = Inputs(args.layer, args.dtype, tokens, sets)
    peers = {n: p for n, p in peers.items() if not ("batched" in n and tokens > 16)}
    table = candidates(block, peers, inputs)
    results = {name: wide(call(0)) for name, call in table.items()}
    base = next(iter(results.values()))
    for name, result in results.items():
        # bfloat16 peers round every intermediate: some roundings of 2^-9.
        limit = 1e-4 if args.dtype == "float32" else 2e-2
        error = float(np.linalg.norm(result - base) / np.linalg.norm(base))
        if not error <= limit:
            raise SystemExit(f"{name} differs from {next(iter(results))}: {error}")
    start = time.perf_counter()
    run(table, sets, 1, flush if tokens <= 4 else None)
    once = time.perf_counter() - start
    rounds = max(3, min(200, int(args.seconds / once)))
    seconds = run(table, sets, rounds, flush if tokens <= 4 else None)
    best = min(s for n, s in seconds.items() if n.startswith("moec"))
    _, top_k, hidden, inner = LAYERS[args.layer]
    size = 3 * hidden * inner
    width = 4 if args.dtype == "float32" else 2
    rows = []
    for name, spent in seconds.items():
        rate = inputs.active * size * width / spent
        flops = 2.0 * tokens * top_k * size / spent
        rows.append(
            {
                "layer": args.layer,
                "dtype": args.dtype,
                "threads": args.threads,
                "tokens": tokens,
                "name": name,
                "milliseconds": round(spent * 1e3, 3),
                "ratio": round(spent / best, 3),
                "of_read": round(rate / machine.read, 3),
                "of_peak": round(flops / machine.flops, 3),
                "rounds": rounds,
            }
        )
        row = rows[-1]
        print(
            f"T={tokens:<5} {name:<26} {row['milliseconds']:>10.2f} ms  x{row['ratio']:<7.2f}"
            f" read {row['of_read']:.2f}  peak {row['of_peak']:.2f}",
            flush=True,
        )
    return rows


def write_results(args: argparse.Namespace, rows: list[dict[str, Any]], machine: Any) -> None:
    packages = ("moec", "apache-tvm", "torch", "transformers", "onnxruntime", "numpy")
    document = {
        "machine": {
            "cpu": host.host().cpu,
            "cores": host.host().cores,
            "system": platform.platform(),
            "read_bytes_per_second": round(machine.read),
            "flops_per_second": round(machine.flops),
        },
        "versions": {name: host.installed(name) for name in packages},
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "rows": rows,
    }
    args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
