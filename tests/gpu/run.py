"""Loaded cases, torch tensors of their inputs, and calls into memory that was poisoned before."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

import moec

from .data import digest, inputs

Array = np.ndarray[Any, Any]
POISON = 0xFF  # NaN in every float type, -1 in int32


@dataclass(frozen=True)
class Case:
    """A block on the GPU, and the float64 results by token count and name."""

    name: str
    block: Any
    results: dict[str, Array]
    prefix: str

    def want(self, tokens: int, name: str) -> Array:
        return self.results[f"{self.prefix}/{tokens}/{name}"]

    @functools.cached_property
    def extra(self) -> tuple[str, ...]:
        """The inputs of the whole block besides x."""
        shared = self.block.spec.shared
        table = self.block.spec.router.vocab_size > 0
        own = shared is not None and shared.own_input
        return (*["token_ids"] * table, *["shared_x"] * own)

    def inputs(self, tokens: int) -> dict[str, torch.Tensor]:
        """The inputs on the GPU; the same that the expected results were computed from."""
        given = inputs(self.block.spec, tokens)
        if tokens:
            assert digest(given) == str(self.want(tokens, "digest")), "other random numbers"
        return {name: tensor(array) for name, array in given.items()}

    def moe(self, given: dict[str, torch.Tensor], schedule: str | None) -> Any:
        extra = {name: given[name] for name in self.extra}
        return poisoned(lambda: self.block(given["x"], schedule=schedule, **extra))

    def route(self, given: dict[str, torch.Tensor], schedule: str | None) -> Any:
        extra = {name: given[name] for name in self.extra if name == "token_ids"}
        return poisoned(lambda: self.block.route(given["x"], schedule=schedule, **extra))

    def experts(self, given: dict[str, torch.Tensor], routing: str, schedule: str | None) -> Any:
        x, ids, weights = given["x"], given[routing], given["weights"]
        return poisoned(lambda: self.block.experts(x, ids, weights, schedule=schedule))


@functools.cache
def load(folder: Path, artifact: str) -> dict[str, Case]:
    """The cases of an artifact by name, loaded once."""
    model = moec.load(folder / f"{artifact}.moec", device="cuda:0")
    names = json.loads((folder / f"{artifact}.json").read_text())
    results = dict(np.load(folder / f"{artifact}.npz"))
    return {name: Case(name, model[n], results, str(n)) for n, name in enumerate(names)}


def tensor(array: Array) -> torch.Tensor:
    """A NumPy array on the GPU."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(array).cuda()


def poisoned(call: Callable[[], Any]) -> Any:
    """The result of a call whose result and workspace lie in memory full of NaN."""
    # The caching allocator hands freed blocks out again: what the call gets was poisoned.
    dirty = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in (1 << 26, 1 << 20)]
    for block in dirty:
        block.fill_(POISON)
    del dirty
    return call()


def error(got: torch.Tensor, want: Array) -> float:
    """|got - want| / |want| in float64; NaN never passes a comparison."""
    ours = got.double().cpu().numpy()
    norm = float(np.linalg.norm(want.astype(np.float64)))
    difference = float(np.linalg.norm(ours - want))
    return difference / norm if norm else difference


def limit_tokens(schedule: str, tokens: int) -> bool:
    """Whether a schedule is defined for so many tokens."""
    return schedule != "gather" or tokens <= 8
