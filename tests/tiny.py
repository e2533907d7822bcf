"""A tiny checkpoint (mixtral, float32, one tensor per expert) and its layer in float64 NumPy.

For tests that need some real checkpoint and neither torch nor transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

E, K, H, I, LAYERS = 6, 2, 24, 16, 2
Array = np.ndarray[Any, np.dtype[Any]]

CONFIG = {
    "model_type": "mixtral",
    "dtype": "float32",
    "hidden_act": "silu",
    "hidden_size": H,
    "intermediate_size": I,
    "num_hidden_layers": LAYERS,
    "num_local_experts": E,
    "num_experts_per_tok": K,
}


def write(folder: Path) -> dict[str, Array]:
    """Write config.json and model.safetensors; returns the tensors by name."""
    random = np.random.default_rng(7)
    tensors: dict[str, Array] = {}
    for layer in range(LAYERS):
        base = f"model.layers.{layer}.block_sparse_moe"
        shapes = {f"{base}.gate.weight": (E, H)}
        for e in range(E):
            shapes |= {f"{base}.experts.{e}.{w}.weight": (I, H) for w in ("w1", "w3")}
            shapes[f"{base}.experts.{e}.w2.weight"] = (H, I)
        for name, shape in shapes.items():
            tensors[name] = (random.standard_normal(shape) * 0.2).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return tensors


def inputs(tokens: int) -> Array:
    """x [T, H] float32."""
    return np.random.default_rng(tokens).standard_normal((tokens, H)).astype(np.float32)


def moe(tensors: dict[str, Array], layer: int, x: Array) -> Array:
    """y [T, H] float64: softmax over all experts, the K best, renormalised."""
    base = f"model.layers.{layer}.block_sparse_moe"
    w = {n.removeprefix(base + "."): t.astype(np.float64) for n, t in tensors.items()}
    x = x.astype(np.float64)
    score = np.exp(x @ w["gate.weight"].T)
    y = np.zeros_like(x)
    for t, row in enumerate(x):
        best = np.argsort(-score[t])[:K]
        for e in best:
            gate, up = (w[f"experts.{e}.{n}.weight"] @ row for n in ("w1", "w3"))
            h = gate / (1.0 + np.exp(-gate)) * up
            y[t] += score[t, e] / score[t, best].sum() * (w[f"experts.{e}.w2.weight"] @ h)
    return y
