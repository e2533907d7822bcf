"""The layers that bench/cpu.py times, their checkpoints, and inputs for them."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from moec.artifact import anonymous

# name -> (E, K, H, I); mixtral with half its width, so that it fits beside its peers.
LAYERS = {
    "qwen3": (128, 8, 2048, 768),
    "olmoe": (64, 8, 2048, 1024),
    "mixtral": (8, 2, 4096, 7168),
    "tiny": (16, 4, 256, 128),
}
NUMPY = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
_PREFIX = "model.layers.0.mlp"


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

    tensors = {f"{_PREFIX}.gate.weight": tensor(experts, hidden)}
    for e in range(experts):
        prefix = f"{_PREFIX}.experts.{e}"
        tensors[f"{prefix}.gate_proj.weight"] = tensor(inner, hidden)
        tensors[f"{prefix}.up_proj.weight"] = tensor(inner, hidden)
        tensors[f"{prefix}.down_proj.weight"] = tensor(hidden, inner)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def canonical(folder: Path, layer: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """gate_up [E, 2I, H] and down [E, H, I]; the peers that take them so share this memory."""
    experts, _, hidden, inner = LAYERS[layer]
    stored = load_file(folder / "model.safetensors")
    bits = {"float32": "float32", "bfloat16": "uint16"}[dtype]
    gate_up = anonymous((experts, 2 * inner, hidden), bits).view(NUMPY[dtype])
    down = anonymous((experts, hidden, inner), bits).view(NUMPY[dtype])
    for e in range(experts):
        prefix = f"{_PREFIX}.experts.{e}"
        gate_up[e, :inner] = stored[f"{prefix}.gate_proj.weight"]
        gate_up[e, inner:] = stored[f"{prefix}.up_proj.weight"]
        down[e] = stored[f"{prefix}.down_proj.weight"]
    return gate_up, down


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
