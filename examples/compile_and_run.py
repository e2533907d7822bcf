"""Write a tiny Qwen3-MoE-shaped checkpoint, compile it, load it, run it, compare with NumPy."""

import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import moec

E, K, H, I = 8, 2, 64, 32  # experts, experts per token, hidden size, intermediate size
CONFIG = {"model_type": "qwen3_moe", "dtype": "float32", "num_hidden_layers": 1, "hidden_size": H,
          "moe_intermediate_size": I, "num_experts": E, "num_experts_per_tok": K}  # fmt: skip


def write_checkpoint(folder: str) -> dict[str, np.ndarray]:
    random, kinds = np.random.default_rng(0), {"gate": (I, H), "up": (I, H), "down": (H, I)}
    shapes = {f"experts.{e}.{n}_proj": s for e in range(E) for n, s in kinds.items()}
    shapes["gate"] = (E, H)
    w = {n: random.normal(0, 0.1, s).astype(np.float32) for n, s in shapes.items()}
    tensors = {f"model.layers.0.mlp.{name}.weight": tensor for name, tensor in w.items()}
    save_file(tensors, f"{folder}/model.safetensors")
    Path(folder, "config.json").write_text(json.dumps(CONFIG))
    return w


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        w = write_checkpoint(folder)
        moec.compile(folder, target="cpu", out=f"{folder}/tiny.moec")
        block = moec.load(f"{folder}/tiny.moec")[0]
        x = np.random.default_rng(1).standard_normal((5, H)).astype(np.float32)
        (ids, weights), want = block.route(x), np.zeros_like(x)
        for t, k in np.ndindex(ids.shape):
            gate, up, down = (w[f"experts.{ids[t, k]}.{n}_proj"] for n in ("gate", "up", "down"))
            h = (gate @ x[t]) / (1 + np.exp(-(gate @ x[t]))) * (up @ x[t])
            want[t] += weights[t, k] * (down @ h)
        print(block, "differs from NumPy by at most", abs(block(x) - want).max())
