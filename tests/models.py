"""Tiny random transformers models of the nine families, and their own modules as oracles.

`tiny` builds and saves a model; the `reference_*` functions call the transformers modules
themselves. Arrays in are NumPy (float32, or bfloat16 of ml_dtypes) or torch; out is NumPy:
ids int32 [T, K], weights float32 [T, K], states float32 [T, H] holding values of the model's
dtype. Sizes are tiny, variant "b" of every family has none that is a multiple of 16.
"""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import numpy as np
import torch
import transformers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VARIANTS = ("a", "b")

_BASE = {
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WIDE = {**_BASE, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_ODD = {**_BASE, "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
_MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8}  # fmt: skip

# family -> (config class, model class, the two variants)
FAMILIES: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {
        "a": {**_WIDE, "intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 8,
              "num_experts_per_tok": 2},
        "b": {**_ODD, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 6,
              "num_experts_per_tok": 3, "hidden_act": "gelu"},
    }),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {
        "a": {**_WIDE, "intermediate_size": 80, "moe_intermediate_size": 48,
              "shared_expert_intermediate_size": 96, "num_hidden_layers": 3, "num_experts": 8,
              "num_experts_per_tok": 4, "norm_topk_prob": False, "mlp_only_layers": [1]},
        "b": {**_ODD, "intermediate_size": 56, "moe_intermediate_size": 24,
              "shared_expert_intermediate_size": 36, "num_hidden_layers": 4, "num_experts": 6,
              "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 2},
    }),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {
        "a": {**_WIDE, "intermediate_size": 80, "moe_intermediate_size": 32,
              "num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 4,
              "norm_topk_prob": True, "decoder_sparse_step": 2, "head_dim": 16},
        "b": {**_ODD, "intermediate_size": 56, "moe_intermediate_size": 24,
              "num_hidden_layers": 3, "num_experts": 6, "num_experts_per_tok": 3,
              "norm_topk_prob": False, "mlp_only_layers": [0], "head_dim": 10},
    }),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {
        "a": {**_WIDE, "intermediate_size": 48, "num_hidden_layers": 2, "num_experts": 8,
              "num_experts_per_tok": 2, "norm_topk_prob": False},
        "b": {**_ODD, "intermediate_size": 24, "num_hidden_layers": 1, "num_experts": 6,
              "num_experts_per_tok": 4, "norm_topk_prob": True},
    }),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {
        "a": {**_WIDE, **_MLA, "num_key_value_heads": 4, "intermediate_size": 80,
              "moe_intermediate_size": 32, "num_hidden_layers": 3, "n_routed_experts": 16,
              "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
              "routed_scaling_factor": 2.5, "n_shared_experts": 1, "first_k_dense_replace": 1},
        "b": {**_ODD, **_MLA, "num_key_value_heads": 4, "intermediate_size": 56,
              "moe_intermediate_size": 24, "num_hidden_layers": 3, "n_routed_experts": 6,
              "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2, "norm_topk_prob": False,
              "routed_scaling_factor": 1.3, "n_shared_experts": 2, "first_k_dense_replace": 2},
    }),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {
        "a": {**_WIDE, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 8,
              "num_experts_per_tok": 4, "head_dim": 16},
        "b": {**_ODD, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 5,
              "num_experts_per_tok": 2, "head_dim": 10, "swiglu_limit": 1.5,
              "swiglu_alpha": 1.25},
    }),
    "llama4_text": ("Llama4TextConfig", "Llama4ForCausalLM", {
        "a": {**_WIDE, "intermediate_size": 48, "intermediate_size_mlp": 80, "head_dim": 16,
              "num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 1,
              "interleave_moe_layer_step": 2},
        "b": {**_ODD, "intermediate_size": 24, "intermediate_size_mlp": 56, "head_dim": 10,
              "num_hidden_layers": 4, "num_local_experts": 6, "num_experts_per_tok": 2,
              "moe_layers": [1, 2]},
    }),
    "gemma4_text": ("Gemma4TextConfig", "Gemma4ForCausalLM", {
        "a": {**_WIDE, "intermediate_size": 80, "moe_intermediate_size": 32, "head_dim": 16,
              "global_head_dim": 16, "num_hidden_layers": 2, "num_experts": 8,
              "top_k_experts": 2, "enable_moe_block": True, "hidden_size_per_layer_input": 0,
              "layer_types": ["sliding_attention", "full_attention"]},
        "b": {**_ODD, "intermediate_size": 56, "moe_intermediate_size": 24, "head_dim": 10,
              "global_head_dim": 10, "num_hidden_layers": 2, "num_experts": 6,
              "top_k_experts": 3, "enable_moe_block": True, "hidden_size_per_layer_input": 0,
              "layer_types": ["sliding_attention", "full_attention"], "rms_norm_eps": 1e-3},
    }),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", {
        "a": {**_WIDE, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 8,
              "num_experts_per_tok": 2, "router_jitter_noise": 0.01},
        "b": {**_ODD, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 6,
              "num_experts_per_tok": 2, "router_jitter_noise": 0.2},
    }),
}  # fmt: skip


def tiny(family: str, variant: str, dtype: str, path: str | pathlib.Path | None) -> Any:
    """Build the model, save it to `path` (unless None) by save_pretrained, return it."""
    config_class, model_class, variants = FAMILIES[family]
    config = getattr(transformers, config_class)(**variants[variant])
    config.dtype = DTYPES[dtype]
    config._experts_implementation = "eager"
    torch.manual_seed(sum(map(ord, family + variant)))
    model = getattr(transformers, model_class)(config).eval()
    _randomise(model, config.hidden_size)
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and "e_score_correction_bias" not in name:
            buffer.data = buffer.data.to(DTYPES[dtype])
    if path is not None:
        model.save_pretrained(path)
    return model


def _randomise(model: Any, hidden: int) -> None:
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "rotary" in name or "inv_freq" in name or "layer_scalar" in name:
                continue
            noise = torch.randn(tensor.shape)
            if "e_score_correction_bias" in name:  # both signs, so that masking shows
                tensor.copy_(noise * 0.5 - 0.4)
            elif "per_expert_scale" in name or "norm" in name or name.endswith(".scale"):
                tensor.copy_(1.0 + 0.3 * noise)
            elif "bias" in name:
                tensor.copy_(noise * 0.5)
            elif "gate.weight" in name or "router" in name:
                tensor.copy_(noise * (2.0 / hidden**0.5))
            elif tensor.is_floating_point() and tensor.dim() >= 2:
                tensor.copy_(noise * (1.5 / hidden**0.5))


def widened(model: Any) -> Any:
    """The same model with the same weights, computing in float32.

    `input_dtype` is what a weighted expert input is rounded to: that is part of the layer.
    """
    twin = copy.deepcopy(model).float()
    twin.input_dtype = model.dtype
    twin.config.dtype = torch.float32
    return twin


def moe_layers(model: Any) -> list[int]:
    """The numbers of the MoE layers."""
    layers = range(model.config.num_hidden_layers)
    return [n for n in layers if getattr(_feed_forward(model, n), "experts", None) is not None]


def _feed_forward(model: Any, layer: int) -> Any:
    """The module that holds router and experts: the block, or gemma4's decoder layer."""
    decoder = model.model.layers[layer]
    if hasattr(decoder, "experts"):
        return decoder
    return decoder.feed_forward if hasattr(decoder, "feed_forward") else decoder.mlp


def _torch(array: Any, model: Any) -> torch.Tensor:
    if not isinstance(array, torch.Tensor):
        array = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return array.to(model.dtype)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().numpy()


def _top_k(model: Any) -> int:
    config = model.config
    return int(getattr(config, "top_k_experts", None) or config.num_experts_per_tok)


@torch.no_grad()
def reference_route(model: Any, layer: int, x: Any) -> tuple[np.ndarray, np.ndarray]:
    """ids and weights of the model's router for x [T, H] (gemma4: the residual stream)."""
    block, x, k = _feed_forward(model, layer), _torch(x, model), _top_k(model)
    if len(x) == 0:
        return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
    router = block.gate if hasattr(block, "gate") else block.router
    out = router(x)
    if len(out) == 2:  # llama4: sigmoid scores of all experts, and the logits
        scores, logits = out
        ids = torch.topk(logits, k, dim=1).indices
        weights = scores.gather(1, ids)
    else:
        _, weights, ids = out
    return ids.numpy().astype(np.int32), _numpy(weights)


@torch.no_grad()
def reference_experts(model: Any, layer: int, x: Any, ids: Any, weights: Any) -> np.ndarray:
    """The routed experts alone on x [T, H], for given ids and weights [T, K].

    Ids outside [0, E) contribute 0. For gemma4 this is the bare experts module: x is what
    pre_feedforward_layernorm_2 gives, and post_feedforward_layernorm_2 is not applied.
    """
    experts, x = _feed_forward(model, layer).experts, _torch(x, model)
    ids = torch.from_numpy(np.asarray(ids).astype(np.int64))
    weights = torch.from_numpy(np.asarray(weights, dtype=np.float32))
    if len(x) == 0:
        return _numpy(x)
    outside = (ids < 0) | (ids >= experts.num_experts)
    ids, weights = ids.masked_fill(outside, 0), weights.masked_fill(outside, 0.0)
    if hasattr(experts, "expert_dim"):
        rounded = getattr(model, "input_dtype", model.dtype)
        return _numpy(_weighted_inputs(experts, x, ids, weights, rounded))
    return _numpy(experts(x, ids, weights))


def _weighted_inputs(
    experts: Any, x: Any, ids: Any, weights: Any, rounded: torch.dtype
) -> torch.Tensor:
    # llama4's module wants all experts on all tokens; this feeds every chosen pair to the
    # module through its own bmm by giving each expert its rows and zeros elsewhere.
    total = torch.zeros(x.shape, dtype=torch.float32)
    for slot in range(ids.shape[1]):
        fed = torch.zeros(experts.num_experts, *x.shape, dtype=x.dtype)
        rows = torch.arange(len(x))
        fed[ids[:, slot], rows] = (x * weights[:, slot, None]).to(rounded).to(x.dtype)
        out = experts(fed.reshape(-1, x.shape[1])).reshape(fed.shape)
        total += out[ids[:, slot], rows].float()
    return total.to(x.dtype)


@torch.no_grad()
def reference_moe(model: Any, layer: int, x: Any) -> np.ndarray:
    """The whole block on x [T, H]: routed and shared experts.

    For gemma4 x is the residual stream after attention, and the result is the residual
    stream after the feed-forward half.
    """
    block, x = _feed_forward(model, layer), _torch(x, model)
    if len(x) == 0:
        return _numpy(x)
    if hasattr(block, "pre_feedforward_layernorm_2"):
        return _numpy(_gemma4(block, x))
    out = block(x[None])
    out = out[0] if isinstance(out, tuple) else out
    return _numpy(out.reshape(x.shape))


def _gemma4(layer: Any, x: torch.Tensor) -> torch.Tensor:
    dense = layer.mlp(layer.pre_feedforward_layernorm(x))
    dense = layer.post_feedforward_layernorm_1(dense)
    _, weights, ids = layer.router(x)
    routed = layer.experts(layer.pre_feedforward_layernorm_2(x), ids, weights)
    routed = layer.post_feedforward_layernorm_2(routed)
    return x + layer.post_feedforward_layernorm(dense + routed)
