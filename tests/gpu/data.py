"""The inputs of the cases, drawn from seeds wherever they are needed; a digest tells equal ones.

Of many tokens a sample of rows is compared: no row depends on another.
"""

from __future__ import annotations

import hashlib
from typing import Any

import ml_dtypes
import numpy as np

from moec.spec import MoESpec

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
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
