"""What a schedule and a backend are: declared values that lower a block for one kind of target.

A schedule turns the op graph of a block into kernels, and for each function of the block the
straight line of kernel calls that computes it. What follows (entry functions, artifact) is
the same for all schedules and all targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import TargetError
from ..spec import MoESpec
from ..target import KINDS, Target
from .buffers import Buf, Kernel
from .entry import Entry, Wiring, build_entry
from .program import Lowering


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

    def __str__(self) -> str:
        if self.high is None:
            return f"T >= {self.low}" if self.low else "any T"
        return f"{self.low} <= T < {self.high}" if self.low else f"T < {self.high}"


@dataclass(frozen=True)
class Schedule:
    """One way to lower a block on one kind of target.

    `passes` are target-free rewrites, applied in order to the op graph. `config` is the frozen
    value of tile sizes and options that the backend's legalization reads. `tokens` is the range
    in which the schedule is chosen by default; None = only when asked for by name. `span` gives
    the range for a block where it depends on the block's sizes. `supports`
    returns None, or the reason why the schedule cannot compute a block. `named` are
    instruction sets on which the schedule is chosen by name only.
    """

    name: str
    kind: str
    doc: str
    passes: tuple[Any, ...]
    config: Any
    tokens: TokenRange | None
    deterministic: bool
    supports: Callable[[MoESpec, Target], str | None]
    span: Callable[[MoESpec], TokenRange] | None = None
    named: frozenset[str] = frozenset()

    def range(self, spec: MoESpec) -> TokenRange | None:
        """The token counts for which the schedule is chosen for a block by default."""
        return self.span(spec) if self.span and self.tokens else self.tokens

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise TargetError(f"schedule name {self.name!r} is not an identifier")
        if self.kind not in KINDS:
            raise TargetError(f"schedule {self.name!r} has an unknown target kind {self.kind!r}")


MakeEntry = Callable[[str, Wiring, Mapping[str, Buf], Mapping[str, Buf], Mapping[str, Buf]], Entry]


@dataclass(frozen=True)
class Backend:
    """All that a kind of target brings to the compiler.

    `open(spec, target, prefix)` starts the lowering of one block shape, whose symbols begin
    with `prefix`; the schedules of the shape share it, and with it every kernel that they have
    in common. `packing` says how every parameter is bound, and gives the kernels that pack.
    `build` compiles functions into a library file, `requires` names what a machine needs to
    run it (as the artifact's manifest writes it). `entry` turns a straight line of kernel calls
    into one compiled function. `strategies` are names for several schedules, of which those
    that fit a block share its token counts.
    """

    kind: str
    schedules: Mapping[str, Schedule]
    open: Callable[[MoESpec, Target, str], Lowering]
    packing: Callable[[MoESpec, Target, str], tuple[dict[str, Packed], dict[str, Kernel]]]
    build: Callable[[Mapping[str, Any], Target, Path], None]
    requires: Callable[[Target], dict[str, Any]]
    entry: MakeEntry = build_entry
    strategies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, schedule in self.schedules.items():
            if name != schedule.name or schedule.kind != self.kind:
                raise TargetError(f"schedule {schedule.name!r} is not one of backend {self.kind}")


def choose(backend: Backend, names: tuple[str, ...], spec: MoESpec, target: Target) -> Chosen:
    """The schedules to compile for a block, with the token range of each.

    By default all that have a range and fit; otherwise those named. Raises TargetError when a
    named one is unknown or refuses the block: it is never replaced.
    """
    schedules = backend.schedules
    if names:
        found = (s for name in names for s in _named(backend, name, spec, target))
        chosen = list({s.name: s for s in found}.values())
    else:
        chosen = _usable(schedules.values(), spec, target)
    if not chosen:
        reasons: dict[str | None, list[str]] = {}
        for s in schedules.values():
            reasons.setdefault(s.supports(spec, target), []).append(s.name)
        raise TargetError(
            f"no schedule of {target.name} computes this block",
            need="; ".join(f"{', '.join(own)}: {reason}" for reason, own in reasons.items()),
        )
    return _cover(chosen, spec)


Chosen = list[tuple[Schedule, "TokenRange | None"]]


def _usable(schedules: Iterable[Schedule], spec: MoESpec, target: Target) -> list[Schedule]:
    """Those that are chosen without being named."""
    return [
        s
        for s in schedules
        if s.tokens and target.isa not in s.named and not s.supports(spec, target)
    ]


def _named(backend: Backend, name: str, spec: MoESpec, target: Target) -> list[Schedule]:
    schedules = backend.schedules
    if name in backend.strategies:
        chosen = _usable((schedules[n] for n in backend.strategies[name]), spec, target)
        if chosen:
            return chosen
        members = (schedules[n] for n in backend.strategies[name])
        reason: str | None = "; ".join(f"{s.name}: {s.supports(spec, target)}" for s in members)
    elif name in schedules:
        reason = schedules[name].supports(spec, target)
        if reason is None:
            return [schedules[name]]
    else:
        raise TargetError(
            f"target {target.name} has no schedule {name!r}",
            need="one of " + ", ".join((*backend.strategies, *schedules)),
            hint="'moec targets' lists the schedules of every target",
        )
    raise TargetError(
        f"schedule {name!r} refuses this block: {reason}",
        hint="leave --schedule out to let moec choose",
    )


def _cover(chosen: list[Schedule], spec: MoESpec) -> Chosen:
    """Stretch the ranges so that every T has a schedule, whichever were chosen.

    Of schedules for the same T the first gets it, the others are there by name.
    """
    lows: dict[str, int] = {}
    for s in chosen:
        found = s.range(spec)
        if found and found.low not in lows.values():
            lows[s.name] = found.low
    if not lows:
        lows = {chosen[0].name: 0}
    names = sorted(lows, key=lows.__getitem__)
    edges = [0, *(lows[name] for name in names[1:])]
    spans = {
        name: TokenRange(low, high)
        for name, low, high in zip(names, edges, [*edges[1:], None], strict=True)
    }
    return [(s, spans.get(s.name)) for s in chosen]
