"""What a schedule moves on the emulated device beside what the computation has to move.

    python -m tests.metal.traffic

prints the table of docs/metal.md. For the experts of a layer: `needed` is every weight byte of
a chosen expert once and every input row once; `distinct` is what the launches read when a
byte read again comes from a cache; `read` counts every load. Tiles have a floor of their own:
each tile of 32 rows reads its expert's weight once, and its rows once for each tile of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from moec.spec import ExpertsSpec, MoESpec, RouterSpec
from tests.metal.block import Block
from tools.metal_emulator import Counters, install, launches, options


@dataclass(frozen=True)
class Case:
    """A layer, a batch and the schedule that moec chooses for it."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int
    tokens: int
    schedule: str


CASES = (
    Case("decode, 1 token", 16, 4, 512, 256, 1, "gather"),
    Case("decode, 1 token, wide", 8, 2, 2304, 192, 1, "gather"),
    Case("decode, 2 tokens", 16, 4, 512, 256, 2, "fused"),
    Case("decode, 5 tokens", 16, 4, 512, 256, 5, "fused"),
    Case("prefill, 40 tokens", 8, 2, 256, 128, 40, "fused"),
    Case("prefill, 130 tokens", 8, 2, 256, 128, 130, "fused"),
    Case("prefill, 130 tokens, many experts", 32, 4, 256, 64, 130, "fused"),
)
_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Row:
    """One matmul of a case; all numbers but the last three are bytes read."""

    case: Case
    kernel: str
    needed: int
    tile_floor: int | None
    distinct: int
    read: int
    written: int
    threadgroup: int
    barriers: int


def measure(case: Case) -> tuple[list[Row], list[Counters]]:
    """The two matmuls of a case, and every launch of its `experts` function."""
    spec = MoESpec(
        "bfloat16",
        RouterSpec(case.experts, case.top_k),
        ExpertsSpec(case.experts, case.top_k, case.hidden, case.inner),
    )
    random, block = np.random.default_rng(9), Block(spec, (case.schedule,))
    x = random.normal(size=(case.tokens, case.hidden)).astype(ml_dtypes.bfloat16)
    ids = np.stack([random.permutation(case.experts)[: case.top_k] for _ in range(case.tokens)])
    weights = random.random(ids.shape).astype(np.float32)
    with options(trace=True), launches() as log:
        block.run(
            "experts", case.schedule, x=x, topk_ids=ids.astype(np.int32), topk_weights=weights
        )
    counts = np.bincount(ids.reshape(-1), minlength=case.experts)
    rows = []
    for role, columns, width, inputs in (
        ("gate_up", 2 * case.inner, case.hidden, case.tokens),
        ("down", case.hidden, case.inner, case.tokens * case.top_k),
    ):
        launch = next(c for c in log if role in c.kernel)
        weight = columns * width * _BYTES
        needed = int((counts > 0).sum()) * weight + inputs * width * _BYTES
        floor = None
        if case.schedule == "fused":
            again = -(-columns // 64)  # tiles of columns that read the same rows
            tiles = int((-(-counts // 32)).sum())
            floor = tiles * weight + int(counts.sum()) * width * _BYTES * again
        rows.append(
            Row(case, role, needed, floor, launch.device_read_distinct, launch.device_read,
                launch.device_written, launch.threadgroup_bytes, launch.barriers)
        )  # fmt: skip
    return rows, log


def table() -> str:
    """All cases as a Markdown table."""
    lines = [
        "| case | schedule | matmul | needed | distinct / needed | read / needed "
        "| read / tile floor | written | threadgroup bytes | barriers |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case in CASES:
        for r in measure(case)[0]:
            tile = f"{r.read / r.tile_floor:.3f}" if r.tile_floor else "-"
            lines.append(
                f"| {case.name}: E={case.experts} K={case.top_k} H={case.hidden} I={case.inner} "
                f"| {case.schedule} | {r.kernel} | {r.needed} | {r.distinct / r.needed:.3f} "
                f"| {r.read / r.needed:.3f} | {tile} | {r.written} | {r.threadgroup} "
                f"| {r.barriers} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    install()
    print(table())
