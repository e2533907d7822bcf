"""What transformers' own modules compute: the block's output, and the routing on its way.

A block is called as its decoder layer calls it. The routing is what the block hands to its
experts module (or, where it has none, what its router returns), so nothing of it is ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

Array = np.ndarray[Any, Any]
_BLOCKS = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "mixer", "moe")


def decoder_layer(model: Any, layer: int) -> Any:
    """The decoder layer of that number, wherever the model class keeps its layers."""
    inner = getattr(model, "model", None) or getattr(model, "transformer", None) or model
    layers = getattr(inner, "layers", None)
    return (inner.blocks if layers is None else layers)[layer]


def moe_layers(model: Any) -> list[int]:
    """The numbers of the layers that hold experts."""
    inner = getattr(model, "model", None) or getattr(model, "transformer", None) or model
    layers = getattr(inner, "layers", None)
    layers = inner.blocks if layers is None else layers
    return [n for n, layer in enumerate(layers) if block_of(layer) is not None]


def block_of(layer: Any) -> Any:
    """The module that holds router and experts; the layer itself where they lie in it."""
    if hasattr(layer, "experts"):
        return layer
    for name in _BLOCKS:
        block = getattr(layer, name, None)
        if block is not None and (hasattr(block, "experts") or hasattr(block, "input_linear")):
            return block
    return None


@torch.no_grad()
def run(model: Any, layer: int, x: Array, token_ids: Array) -> tuple[Array, Array, Array]:
    """(y [T, H], ids [T, K], weights [T, K]) of the MoE block of a layer for x [T, H]."""
    holder = decoder_layer(model, layer)
    block = block_of(holder)
    routing = _Routing(block)
    states = torch.from_numpy(x)
    try:
        with lowest_id_first():
            y = _call(holder, block, states, torch.from_numpy(token_ids))
    finally:
        routing.remove()
    ids, weights = routing.result(states)
    return y.reshape(x.shape).numpy(), ids.numpy().astype(np.int32), weights.float().numpy()


@contextlib.contextmanager
def lowest_id_first() -> Iterator[None]:
    """torch.topk leaves open which of equal values it takes: here it takes the lowest index."""

    def topk(values: torch.Tensor, k: int, dim: int = -1, **_: Any) -> Any:
        ordered = torch.sort(values, dim=dim, descending=True, stable=True)
        kept = [part.narrow(dim, 0, k) for part in ordered]
        return torch.return_types.topk(kept)

    with mock.patch.object(torch, "topk", topk), mock.patch.object(torch.Tensor, "topk", topk):
        yield


def _call(layer: Any, block: Any, x: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    if hasattr(layer, "pre_feedforward_layernorm_2"):
        return _beside_a_dense_branch(layer, x)
    if hasattr(getattr(block, "gate", None), "tid2eid"):
        return block(x[None], input_ids=token_ids[None])
    out = block(x[None])
    out = out[0] if isinstance(out, tuple) else out
    if hasattr(layer, "shared_mlp") and layer.shared_mlp is not None:
        out = out + layer.shared_mlp(x[None])
    return out


def _beside_a_dense_branch(layer: Any, x: torch.Tensor) -> torch.Tensor:
    dense = layer.mlp(layer.pre_feedforward_layernorm(x))
    dense = layer.post_feedforward_layernorm_1(dense)
    _, weights, ids = layer.router(x)
    routed = layer.experts(layer.pre_feedforward_layernorm_2(x), ids, weights)
    routed = layer.post_feedforward_layernorm_2(routed)
    return x + layer.post_feedforward_layernorm(dense + routed)


class _Routing:
    """Notes what the experts of a block are called with, and what its router returns."""

    def __init__(self, block: Any) -> None:
        self.experts: tuple[Any, ...] = ()
        # privacy-filter divides its weights by k and multiplies the output by k.
        self.unit = block.num_experts if "PrivacyFilter" in type(block).__name__ else 1
        self.router: tuple[Any, ...] = ()
        self.module = getattr(block, "gate", None) or getattr(block, "router", None)
        self._hooks = [self.module.register_forward_hook(self._returned)]
        if hasattr(block, "experts"):
            self._hooks.append(block.experts.register_forward_pre_hook(self._called))

    def _called(self, _: Any, args: tuple[Any, ...]) -> None:
        self.experts = args

    def _returned(self, _: Any, args: Any, out: Any) -> None:
        self.router = out if isinstance(out, tuple) else (out,)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def result(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, weights) [T, K]."""
        if len(self.router) == 4:  # inkling: the weights of the shared experts come last
            logits, weights, ids, shared = self.router
            shared, count = shared.reshape(len(x), -1), logits.shape[-1]
            last = torch.arange(count, count + shared.shape[-1]).expand(len(x), -1)
            ids = torch.cat([ids.reshape(len(x), -1), last], dim=1)
            return ids, torch.cat([weights.reshape(len(x), -1), shared], dim=1)
        if len(self.experts) == 3:
            return self.experts[1], self.experts[2] * self.unit
        if len(self.router) == 5:  # jetmoe: sorted pairs; its own steps on its own logits
            top = self.router[4].topk(self.module.top_k, dim=1)
            return top.indices, torch.softmax(top.values, dim=1)
        scores, logits = self.router  # llama4: sigmoid scores of all experts
        ids = torch.topk(logits, int((scores > 0).sum(dim=1).max()), dim=1).indices
        return ids, scores.gather(1, ids)
