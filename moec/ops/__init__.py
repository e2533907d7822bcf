"""The ops that spell out a MoE layer: what is computed, never how.

Legend (used in every file, in the IR and in errors): T tokens, E experts, K experts per
token, H hidden size, I intermediate size, S = T*K rows.

Each op has one file with its Relax registration, its type inference and its constructor;
`reference` holds the float64 meaning of every op. `register()` makes them known to TVM; it is
called by the graph builder and by whoever parses IR text.
"""

from __future__ import annotations

from . import (
    activation,
    combine,
    expert_loop,
    gather_rows,
    grouped_matmul,
    indexed_matmul,
    linear,
    pass_weight,
    reduce,
    rms_norm,
    route,
    sort,
    sum_rows,
)
from .define import OpDef, register_all

ALL: tuple[OpDef, ...] = (
    rms_norm.OP,
    linear.OP,
    route.OP,
    sort.OP,
    gather_rows.OP,
    grouped_matmul.OP,
    indexed_matmul.OP,
    expert_loop.OP,
    activation.OP,
    reduce.OP,
    sum_rows.OP,
    pass_weight.OP,
    combine.OP,
)


def register() -> None:
    """Register all ops with Relax and its text parser; harmless when called again."""
    register_all(ALL)
