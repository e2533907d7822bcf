"""What a schedule is: a declared value that lowers the ops of a block for one kind of target.

A schedule turns the op graph of a block into a `Program`: kernels, and for each function of
the block the straight line of kernel calls that computes it. What follows (entry functions,
code generation, artifact) is the same for all schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tvm

from ..errors import TargetError
from ..spec import MoESpec
from ..target import Target


@dataclass(frozen=True)
class Packed:
    """How a canonical parameter is bound: shape and dtype in memory, and who packs it.

    `symbol` is the compiled packing function (None: the canonical values as they are);
    `per_expert` says that it packs one expert at a time into its slice.
    """

    source: str
    shape: tuple[int, ...]
    dtype: str
    symbol: str | None
    per_expert: bool


@dataclass(frozen=True)
class TokenRange:
    """The token counts [low, high) for which a variant is chosen; high None = no limit."""

    low: int = 0
    high: int | None = None


@dataclass(frozen=True)
class Schedule:
    """One way to lower a block on one kind of target.

    `passes` are target-free rewrites, applied in order to the op graph. `lower(module, spec,
    target, prefix)` legalizes what they leave and returns a Program. `tokens` is the range in
    which the schedule is chosen by default; None = only when asked for by name. `supports`
    returns None, or the reason why the schedule cannot compute a block.
    """

    name: str
    kind: str
    doc: str
    passes: tuple[Any, ...]
    lower: Callable[[tvm.IRModule, MoESpec, Target, str], Any]
    tokens: TokenRange | None
    deterministic: bool
    supports: Callable[[MoESpec, Target], str | None]

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise TargetError(f"schedule name {self.name!r} is not an identifier")
        if self.kind not in ("cpu", "cuda", "metal"):
            raise TargetError(f"schedule {self.name!r} has an unknown target kind {self.kind!r}")


def choose(
    schedules: Mapping[str, Schedule], names: tuple[str, ...], spec: MoESpec, target: Target
) -> list[Schedule]:
    """The schedules to compile: those named, or all that have a token range and fit.

    Raises TargetError when a named one is unknown or refuses the block: never replaced.
    """
    if not names:
        fitting = [s for s in schedules.values() if s.tokens and not s.supports(spec, target)]
        if not fitting:
            reasons = "; ".join(f"{s.name}: {s.supports(spec, target)}" for s in schedules.values())
            raise TargetError(f"no schedule of {target.name} computes this block", need=reasons)
        return fitting
    chosen = []
    for name in dict.fromkeys(names):
        if name not in schedules:
            raise TargetError(
                f"target {target.name} has no schedule {name!r}",
                need="one of " + ", ".join(schedules),
                hint="'moec targets' lists the schedules of every target",
            )
        reason = schedules[name].supports(spec, target)
        if reason:
            raise TargetError(
                f"schedule {name!r} refuses this block: {reason}",
                hint="leave --schedule out to let moec choose",
            )
        chosen.append(schedules[name])
    return chosen
