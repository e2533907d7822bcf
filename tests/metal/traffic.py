"""What a schedule moves on the emulated device beside what the computation has to move.

    python -m tests.metal.traffic

prints the table of docs/metal.md. For the experts of a layer: `needed` is every weight byte of
a chosen expert once and every input row once; `distinct` is what the launches read when a
byte read again comes from a cache; `read` counts every load. Tiles have a floor of their own:
each tile reads its expert's weight once, and its rows once for each tile of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf

import ml_dtypes
import numpy as np

from moec import target
from moec.schedules import backend, choose
from moec.schedules.base import Schedule
from moec.spec import ExpertsSpec, MoESpec, RouterSpec
from tests.metal.block import Block
from tools.metal_emulator import Counters, install, launches, options


class Regime(Enum):
    """What may be read for what is needed."""

    DECODE = 1.10
    PREFILL = 1.25
    # More rows an expert than a tile: no tile that fits registers is near (docs/metal.md).
    CROWDED = inf


@dataclass(frozen=True)
class Case:
    """A layer and a batch, for which moec chooses the schedule."""

    name: str
    regime: Regime
    experts: int
    top_k: int
    hidden: int
    inner: int
    tokens: int

    @property
    def spec(self) -> MoESpec:
        """The layer."""
        sizes = self.experts, self.top_k
        return MoESpec("bfloat16", RouterSpec(*sizes), ExpertsSpec(*sizes, self.hidden, self.inner))

    @property
    def schedule(self) -> Schedule:
        """What moec chooses for so many tokens."""
        own, to = backend("metal"), target.resolve("metal:emulated")
        for schedule, span in choose(own, (), self.spec, to):
            if span and span.low <= self.tokens and (not span.high or self.tokens < span.high):
                return schedule
        raise AssertionError("no schedule for so many tokens")


CASES = (
    Case("decode, 1 token", Regime.DECODE, 16, 4, 512, 256, 1),
    Case("decode, 1 token, wide", Regime.DECODE, 8, 2, 2304, 192, 1),
    Case("decode, 2 tokens", Regime.DECODE, 16, 4, 512, 256, 2),
    Case("decode, 5 tokens", Regime.DECODE, 16, 4, 512, 256, 5),
    Case("prefill, 40 tokens", Regime.PREFILL, 8, 2, 256, 128, 40),
    Case("prefill, 63 tokens", Regime.PREFILL, 8, 2, 256, 128, 63),
    Case("prefill, 130 tokens", Regime.PREFILL, 8, 2, 256, 128, 130),
    Case("prefill, 130 tokens, many experts", Regime.PREFILL, 32, 4, 256, 64, 130),
    Case("prefill, 130 tokens, larger", Regime.PREFILL, 16, 4, 512, 256, 130),
    Case("prefill, 130 tokens, few experts", Regime.CROWDED, 4, 2, 256, 128, 130),
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
    schedule = case.schedule
    random, block = np.random.default_rng(9), Block(case.spec, (schedule.name,))
    x = random.normal(size=(case.tokens, case.hidden)).astype(ml_dtypes.bfloat16)
    ids = np.stack([random.permutation(case.experts)[: case.top_k] for _ in range(case.tokens)])
    weights = random.random(ids.shape).astype(np.float32)
    with options(trace=True), launches() as log:
        block.run(
            "experts", schedule.name, x=x, topk_ids=ids.astype(np.int32), topk_weights=weights
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
        floor, tile = None, schedule.config.tile
        if tile is not None:
            again = -(-columns // tile.columns)  # tiles of columns that read the same rows
            tiles = int((-(-counts // tile.rows)).sum())
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
                f"| {case.schedule.name} | {r.kernel} | {r.needed} | {r.distinct / r.needed:.3f} "
                f"| {r.read / r.needed:.3f} | {tile} | {r.written} | {r.threadgroup} "
                f"| {r.barriers} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    install()
    print(table())
