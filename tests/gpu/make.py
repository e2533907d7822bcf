"""Compile the cases and compute what they must give: `python -m tests.gpu.make DIR`.

Inputs are drawn anew on the GPU machine from the same seeds; a digest tells whether they are
the same. Of many tokens the reference computes a sample of rows: no row depends on another.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from moec.spec import MoESpec
from tests.blocks import DTYPES, Small, build

from . import cases

ARTIFACTS = {
    "hopper": ("cuda:sm_90a", cases.CASES),
    "portable": ("cuda:compute_80", cases.PORTABLE),
}
ROWS = 48
Array = np.ndarray[Any, Any]


def inputs(spec: MoESpec, tokens: int) -> dict[str, Array]:
    """x, shared_x [T, H] in the model's dtype, token_ids [T], weights [T, K], and four ids [T, K].

    ids "random" repeat experts within a token, "two" leave all others empty, "outside" name
    what no expert has; "single" is one expert for all.
    """
    random, e = np.random.default_rng(tokens), spec.experts
    known = e.num_experts + e.zero_experts
    shape = (tokens, e.top_k)

    def ids(low: int, high: int) -> Array:
        return random.integers(low, high, shape).astype(np.int32)

    return {
        "x": random.standard_normal((tokens, e.hidden_size)).astype(DTYPES[spec.dtype]),
        "shared_x": random.standard_normal((tokens, e.hidden_size)).astype(DTYPES[spec.dtype]),
        "token_ids": random.integers(0, 50, tokens).astype(np.int32),
        "weights": random.uniform(-1.0, 1.0, shape).astype(np.float32),
        "random": ids(0, known),
        "two": ids(0, min(2, known)),
        "outside": ids(-3, known + 3),
        "single": np.full(shape, e.num_experts - 1, np.int32),
    }


ROUTINGS = ("random", "two", "outside", "single")


def digest(given: dict[str, Array]) -> str:
    """What tells equal inputs from others."""
    raw = b"".join(np.ascontiguousarray(a).tobytes() for a in given.values())
    return hashlib.sha256(raw).hexdigest()[:16]


def sample(tokens: int) -> Array:
    """The rows that are compared, ascending."""
    if tokens <= ROWS:
        return np.arange(tokens)
    return np.sort(np.random.default_rng(tokens + 1).permutation(tokens)[:ROWS])


def expected(small: Small, tokens: int) -> dict[str, Array]:
    """The float64 results of a case: ids and weights of the router, moe, experts by routing."""
    from moec.ops import reference

    given, rows = inputs(small.spec, tokens), sample(tokens)
    own = {name: array[rows] for name, array in given.items()}
    more = {"token_ids": own["token_ids"]}
    out: dict[str, Array] = {"digest": np.array(digest(given))}
    ids, weights = reference.route(small.spec, small.parameters, own["x"], **more)
    out["ids"], out["topk_weights"] = ids, weights
    y = reference.moe(small.spec, small.parameters, own["x"], shared_x=own["shared_x"], **more)
    out["moe"] = y.astype(np.float32)
    for name in ROUTINGS:
        y = reference.experts(small.spec, small.parameters, own["x"], own[name], own["weights"])
        out[name] = y.astype(np.float32)
    return out


def make(out: Path) -> None:
    """Write an artifact for each target, and the expected results of its layers."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (target, table) in ARTIFACTS.items():
        made = build(list(table.values()), out / f"{name}.moec", target)
        results = {
            f"{n}/{tokens}/{key}": value
            for n, small in enumerate(made)
            for tokens in cases.TOKENS
            if tokens
            for key, value in expected(small, tokens).items()
        }
        np.savez_compressed(out / f"{name}.npz", **results)
        (out / f"{name}.json").write_text(json.dumps(list(table)))
        print(f"{name}: {len(made)} blocks for {target}", flush=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
