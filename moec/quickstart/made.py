"""A small but real checkpoint: Qwen3-MoE-shaped, sharded, one tensor per expert, bfloat16."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

Array = np.ndarray[Any, np.dtype[Any]]

LAYER = 1
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
}
_SHARDS = 2
_SEED = 20
# Spread of the weights: that of trained models, so that activations stay near 1.
_SPREAD = 1.0 / 32.0


def write(folder: Path) -> int:
    """Write config.json, an index and two shards into `folder`; returns their bytes."""
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    table: dict[str, str] = {}
    total = 0
    tensors = list(_names())
    part = -(-len(tensors) // _SHARDS)
    random = np.random.default_rng(_SEED)
    for shard in range(_SHARDS):
        file = f"model-{shard + 1:05d}-of-{_SHARDS:05d}.safetensors"
        own = {}
        for name, shape in tensors[shard * part : (shard + 1) * part]:
            values = random.standard_normal(shape, np.float32)
            own[name] = (values * np.float32(_SPREAD)).astype(ml_dtypes.bfloat16)
            table[name] = file
            total += own[name].nbytes
        save_file(own, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return total


def _names() -> Iterator[tuple[str, tuple[int, int]]]:
    hidden, inner = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]
    yield f"model.layers.{LAYER}.mlp.gate.weight", (CONFIG["num_experts"], hidden)
    for e in range(CONFIG["num_experts"]):
        prefix = f"model.layers.{LAYER}.mlp.experts.{e}"
        yield f"{prefix}.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.up_proj.weight", (inner, hidden)
        yield f"{prefix}.down_proj.weight", (hidden, inner)
