"""The canonical parameters of a block, taken from transformers' own modules in memory.

In memory transformers keeps gate_up as [E, 2I, H] (gate rows first) and down as [E, H, I],
except in the two families named below, whatever is on disk. Nothing here knows moec.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

Array = np.ndarray[Any, Any]


def module(model: Any, layer: int) -> Any:
    """The module of a layer that holds router and experts."""
    decoder = model.model.layers[layer]
    if hasattr(decoder, "experts"):  # gemma4
        return decoder
    return decoder.feed_forward if hasattr(decoder, "feed_forward") else decoder.mlp


def numpy(tensor: torch.Tensor) -> Array:
    """A NumPy array (of ml_dtypes for bfloat16) with the same bits."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def parameters(model: Any, family: str, layer: int) -> dict[str, Array]:
    """Every canonical parameter by name; vectors as float32."""
    block = module(model, layer)
    experts = block.experts
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if family in ("gpt_oss", "llama4_text"):  # [E, H, 2I] and [E, I, H] in memory
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    router = block.gate if hasattr(block, "gate") else block.router
    out = {
        "router": (router.proj if family == "gemma4_text" else router).weight,
        "gate_up": gate_up,
        "down": down,
    }
    if family == "gpt_oss":
        rows = [*range(0, gate_up.shape[1], 2), *range(1, gate_up.shape[1], 2)]
        out["gate_up"] = gate_up[:, rows]
        out["gate_up_bias"] = experts.gate_up_proj_bias[:, rows].float()
        out["down_bias"] = experts.down_proj_bias.float()
        out["router_bias"] = router.bias.float()
    if family == "deepseek_v3":
        out["selection_bias"] = router.e_score_correction_bias.float()
    if family == "gemma4_text":
        out["per_expert_scale"] = router.per_expert_scale.float()
        for position, weight in {
            "router_input": router.scale,
            "experts_input": block.pre_feedforward_layernorm_2.weight,
            "experts_output": block.post_feedforward_layernorm_2.weight,
            "shared_input": block.pre_feedforward_layernorm.weight,
            "shared_output": block.post_feedforward_layernorm_1.weight,
            "block_output": block.post_feedforward_layernorm.weight,
        }.items():
            out[f"norm_{position}"] = weight.float()
    shared = {"gemma4_text": "mlp", "deepseek_v3": "shared_experts"}.get(family, "shared_expert")
    if hasattr(block, shared):
        dense = getattr(block, shared)
        out["shared_gate_up"] = torch.cat([dense.gate_proj.weight, dense.up_proj.weight])
        out["shared_down"] = dense.down_proj.weight
    if hasattr(block, "shared_expert_gate"):
        out["shared_router"] = block.shared_expert_gate.weight
    return {name: numpy(tensor) for name, tensor in out.items()}
