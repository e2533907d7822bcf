"""The sparsemixer selection (Liu et al., arXiv 2409.12136) as evaluated at inference.

Two rounds. In each the largest remaining logit m wins, and its weight is its softmax among
the logits that are close to it: those with (m - s) / max(|s|, m) <= 2 eps. The two weights do
not sum to one. Differences and quotients are rounded to the logits' dtype, as the published
code computes them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from tvm import tirx
from tvm.tirx.script import builder as T

from ...spec import RouterSpec
from .emit import Emit, f32, i64, round_up
from .kernel import loop, scalar, when
from .stage import round_scalar
from .topk import argmax, take

_NUMPY = {"bfloat16": bfloat16, "float16": np.float16, "float32": np.float32}


def sparsemixer(em: Emit, b: SimpleNamespace, t: Any, spec: RouterSpec, dtype: str) -> None:
    """Write topk_ids[t] and topk_weights[t] from logits[t]; `b.choice` is scratch."""
    width = round_up(spec.num_experts, em.lanes)
    threshold = float(np.asarray(2.0 * spec.sparsemixer_eps).astype(_NUMPY[dtype]))
    with loop(width) as e:
        T.buffer_store(b.choice, tirx.BufferLoad(b.logits, [t, e]), [t, e])
    for k in range(2):
        best = argmax(em, b.choice, t, width, spec.num_experts)
        top = em.bind(tirx.BufferLoad(b.logits, [t, best]))
        total = scalar("float32", f32(0.0))
        with loop(spec.num_experts) as e:
            s = em.bind(tirx.BufferLoad(b.logits, [t, e]))
            left = em.bind(tirx.BufferLoad(b.choice, [t, e]))
            factor = tirx.Max(T.abs(s), top)
            gap = round_scalar(round_scalar(top - s, dtype) / factor, dtype)
            # `left` is NaN once the expert was selected: it compares with nothing. A gap of
            # NaN (0/0) does not exceed the threshold, hence keeps the expert; written as a
            # negation, TVM turns it into gap <= threshold, which NaN is not.
            share = tirx.Select(em.bind(gap) > f32(threshold), f32(0.0), T.exp(s - top))
            with when(left <= top):
                T.buffer_store(total, tirx.BufferLoad(total, [0]) + share, [0])
        weight = round_scalar(f32(1.0) / tirx.BufferLoad(total, [0]), dtype)
        T.buffer_store(b.topk_ids, tirx.Cast("int32", best), [t, i64(k)])
        T.buffer_store(b.topk_weights, weight, [t, i64(k)])
        take(b.choice, t, best)
