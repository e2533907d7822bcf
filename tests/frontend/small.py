"""A Qwen3-MoE-shaped checkpoint of a few kB, made in NumPy: no torch, milliseconds.

Two layers, both MoE: E=4 K=2 H=8 I=6. `write` takes changed config fields and tensors, so a
test states only what is wrong with its checkpoint.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

E, K, H, I, L = 4, 2, 8, 6, 2  # fmt: skip
DTYPES = {
    "float32": np.dtype("f4"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("f2"),
}
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": L,
    "hidden_size": H,
    "intermediate_size": 20,
    "moe_intermediate_size": I,
    "num_experts": E,
    "num_experts_per_tok": K,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
}
EXPERT = "model.layers.{layer}.mlp.experts.{e}.{part}.weight"
ROUTER = "model.layers.{layer}.mlp.gate.weight"

Tensors = dict[str, np.ndarray]


def config(dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    """The config with some fields changed; a field changed to KeyError is left out."""
    fields = {**CONFIG, "dtype": dtype, **changes}
    return {k: v for k, v in fields.items() if v is not KeyError}


def tensors(dtype: str = "float32", seed: int = 0) -> Tensors:
    """The tensors of both layers, and two that belong to no MoE layer."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(DTYPES[dtype])

    out = {"model.embed_tokens.weight": draw(5, H), "model.norm.weight": draw(H)}
    for layer in range(L):
        out[ROUTER.format(layer=layer)] = draw(E, H)
        for e in range(E):
            for part in ("gate_proj", "up_proj", "down_proj"):
                shape = (H, I) if part == "down_proj" else (I, H)
                out[EXPERT.format(layer=layer, e=e, part=part)] = draw(*shape)
    return out


def expert(layer: int, e: int, part: str) -> str:
    """The name of one expert tensor."""
    return EXPERT.format(layer=layer, e=e, part=f"{part}_proj")


def write(
    path: pathlib.Path,
    fields: Mapping[str, Any] | None = None,
    arrays: Tensors | None = None,
    shards: int = 0,
) -> pathlib.Path:
    """Write a model directory; `shards` 0 is one file without index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config() if fields is None else fields))
    arrays = tensors() if arrays is None else arrays
    if not shards:
        save_file(arrays, path / "model.safetensors")
        return path
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {tensor: names[i % shards] for i, tensor in enumerate(sorted(arrays))}
    for name in names:
        save_file({t: arrays[t] for t, file in where.items() if file == name}, path / name)
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path
