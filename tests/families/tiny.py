"""Tiny random models of the families in table.py, saved by transformers itself."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
import transformers

from .table import COMMON, EXPERTS, FAMILIES, TOP_K

_BIASES = ("e_score_correction_bias", "expert_bias")
_NEAR_ONE = ("norm", "per_expert_scale", "global_scale", "router.scale")


def config_of(family: str, variant: str) -> Any:
    """The config object of a variant: what is common and known to the class, then its own."""
    name, _, *own = FAMILIES[family]
    cls = getattr(transformers, name)
    known = {field for base in cls.__mro__ for field in getattr(base, "__annotations__", {})}
    # What a class calls otherwise: common name -> the name of its field.
    names = {**getattr(cls, "attribute_map", {}), **{k: k for k in known}}
    common = dict(COMMON[variant])
    common |= dict.fromkeys(EXPERTS, common.pop("experts"))
    common |= dict.fromkeys(TOP_K, common.pop("top_k"))
    values = {names[k]: v for k, v in common.items() if names.get(k) in known}
    values |= {names.get(k, k): v for k, v in own[variant == "b"].items()}
    return cls(**values)


def tiny(family: str, variant: str, path: pathlib.Path | None) -> Any:
    """Build the model in float32, with random weights, and save it by save_pretrained."""
    config = config_of(family, variant)
    config._experts_implementation = "eager"
    torch.manual_seed(sum(map(ord, family + variant)))
    model = getattr(transformers, FAMILIES[family][1])(config).eval().float()
    randomise(model, COMMON[variant]["hidden_size"])
    model.requires_grad_(False)
    if path is not None:
        model.save_pretrained(path)
    return model


@torch.no_grad()
def randomise(model: Any, hidden: int) -> None:
    """Random weights of a scale that lets every part of a block show in the result."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "rotary" in name or "inv_freq" in name or not tensor.numel():
            continue
        noise = torch.randn(tensor.shape)
        if name.endswith(_BIASES):  # both signs, so that masking shows
            tensor.copy_(noise * 0.5 - 0.4)
        elif any(part in name for part in _NEAR_ONE) or name.endswith(".scale"):
            tensor.copy_(1.0 + 0.3 * noise)
        elif "tid2eid" in name:
            experts = model.config.n_routed_experts
            rows = torch.stack([torch.randperm(experts) for _ in range(len(tensor))])
            tensor.copy_(rows[:, : tensor.shape[1]])
        elif name.endswith("bias"):
            tensor.copy_(noise * 0.5)
        elif "gate.weight" in name or "router" in name or "gate.wg" in name:
            tensor.copy_(noise * (2.0 / hidden**0.5))
        elif tensor.is_floating_point() and tensor.dim() >= 2:
            tensor.copy_(noise * (1.5 / hidden**0.5))
