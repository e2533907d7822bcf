"""Small checkpoints that together reach every kind of kernel: routers, activations, dtypes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

E, K, H, I = 16, 4, 256, 96

Shapes = Mapping[str, tuple[int, ...]]
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_SEED = 22


@dataclass(frozen=True)
class Layer:
    """The config.json and the tensors of a model with one layer, and what it is there for."""

    name: str
    reaches: str
    config: Mapping[str, Any]
    tensors: Shapes
    float32: frozenset[str] = frozenset()  # tensors that are stored in float32 in any model

    def write(self, folder: Path) -> None:
        """Write the checkpoint into `folder`, which must exist; the same bytes every time."""
        config = {**self.config, "hidden_size": H, "num_hidden_layers": 1, "hidden_act": "silu"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        random = np.random.default_rng(_SEED)
        values = {
            name: (random.standard_normal(shape, np.float32) / 8).astype(
                np.float32 if name in self.float32 else _DTYPES[self.config["dtype"]]
            )
            for name, shape in self.tensors.items()
        }
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def _each(prefix: str, gate: str, up: str, down: str) -> Shapes:
    out: dict[str, tuple[int, ...]] = {}
    for e in range(E):
        out[f"{prefix}{e}.{gate}.weight"] = out[f"{prefix}{e}.{up}.weight"] = (I, H)
        out[f"{prefix}{e}.{down}.weight"] = (H, I)
    return out


_MLP = "model.layers.0.mlp."
_MIXTRAL = "model.layers.0.block_sparse_moe."
_PROJ = ("gate_proj", "up_proj", "down_proj")
_BIAS = f"{_MLP}gate.e_score_correction_bias"

LAYERS = (
    Layer(
        "qwen3_moe",
        "softmax, renormalised",
        {"model_type": "qwen3_moe", "dtype": "bfloat16", "num_experts": E,
         "num_experts_per_tok": K, "moe_intermediate_size": I, "intermediate_size": 2 * I,
         "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        {f"{_MLP}gate.weight": (E, H), **_each(f"{_MLP}experts.", *_PROJ)},
    ),
    Layer(
        "mixtral",
        "float32",
        {"model_type": "mixtral", "dtype": "float32", "num_local_experts": E,
         "num_experts_per_tok": 2, "intermediate_size": I},
        {f"{_MIXTRAL}gate.weight": (E, H), **_each(f"{_MIXTRAL}experts.", "w1", "w3", "w2")},
    ),
    Layer(
        "deepseek_v3",
        "sigmoid, groups, bias of the selection, shared expert",
        {"model_type": "deepseek_v3", "dtype": "float16", "n_routed_experts": E,
         "num_experts_per_tok": K, "moe_intermediate_size": I, "n_shared_experts": 1,
         "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
         "first_k_dense_replace": 0},
        {f"{_MLP}gate.weight": (E, H), _BIAS: (E,), **_each(f"{_MLP}experts.", *_PROJ),
         f"{_MLP}shared_experts.gate_proj.weight": (I, H),
         f"{_MLP}shared_experts.up_proj.weight": (I, H),
         f"{_MLP}shared_experts.down_proj.weight": (H, I)},
        frozenset({_BIAS}),
    ),
    Layer(
        "gpt_oss",
        "softmax of the selected, biases, clamped activation",
        {"model_type": "gpt_oss", "dtype": "bfloat16", "num_local_experts": E,
         "num_experts_per_tok": K, "intermediate_size": I, "swiglu_limit": 7.0},
        {f"{_MLP}router.weight": (E, H), f"{_MLP}router.bias": (E,),
         f"{_MLP}experts.gate_up_proj": (E, H, 2 * I),
         f"{_MLP}experts.gate_up_proj_bias": (E, 2 * I),
         f"{_MLP}experts.down_proj": (E, I, H), f"{_MLP}experts.down_proj_bias": (E, H)},
    ),
)  # fmt: skip
