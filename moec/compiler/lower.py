"""One block shape for one target: graph -> passes -> legalized -> kernels and entries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax

from ..frontend.graph import Signature, build_graph, signatures
from ..schedules import Backend, Packed, Schedule, TokenRange
from ..schedules.buffers import Buf, Kernel, PerToken
from ..schedules.entry import Entry, Wiring, wiring
from ..spec import MoESpec
from ..target import Target
from .instruments import Observer


@dataclass(frozen=True)
class Variant:
    """A function of the block lowered by one schedule."""

    schedule: Schedule
    tokens: TokenRange | None
    entry: Entry


@dataclass
class Lowered:
    """What a block shape became: everything that the library and the manifest need."""

    shape: str
    spec: MoESpec
    graph: tvm.IRModule
    kernels: dict[str, Kernel] = field(default_factory=dict)
    variants: dict[str, list[Variant]] = field(default_factory=dict)
    packed: dict[str, Packed] = field(default_factory=dict)

    @property
    def functions(self) -> dict[str, Any]:
        """Every PrimFunc by symbol: kernels, packing, entries."""
        entries = {v.entry.symbol: v.entry.func for vs in self.variants.values() for v in vs}
        return {**{symbol: kernel.func for symbol, kernel in self.kernels.items()}, **entries}


def lower(
    shape: str,
    spec: MoESpec,
    target: Target,
    backend: Backend,
    schedules: list[tuple[Schedule, TokenRange | None]],
    observer: Observer,
    stop_after: str | None,
) -> Lowered:
    """Lower a block with every schedule; what is asked to be seen last stops it earlier."""
    graph = build_graph(spec)
    lowered = Lowered(shape, spec, graph)
    with observer.passes(shape):
        observer.show("graph", graph)
    if stop_after == "graph":
        observer.shown.append(f"# {shape}: the graph\n{graph.script()}")
        return lowered
    lowering = backend.open(spec, target, f"{shape}_op")  # entries are {shape}_{function}
    lowered.packed, packers = backend.packing(spec, target, shape)
    entries: dict[Any, Entry] = {}
    names = {schedule.name: lowering.names(schedule.config) for schedule, _ in schedules}
    for schedule, tokens in schedules:
        with observer.passes(f"{shape}-{schedule.name}"):
            module = graph
            for rewrite in schedule.passes:
                module = rewrite(module)
            if stop_after == "passes":
                observer.shown.append(f"# {shape} for {schedule.name}\n{module.script()}")
                continue
            with tvm.target.Target("llvm"):  # LegalizeOps wants one; the map does not look at it
                table = lowering.table(schedule.config)
                module = relax.transform.LegalizeOps(table)(module)
        if stop_after == "legalized":
            observer.shown.append(f"# {shape} for {schedule.name}\n{module.script()}")
        for signature in signatures(spec):
            lines = wiring(module[signature.name], lowering.kernels, names[schedule.name])
            # Equal lines of calls are one entry: routing is the same in every schedule.
            key = (signature.name, lines)
            if key not in entries:
                symbol = _symbol(shape, signature.name, entries)
                taken = _taken(signature, names.values())
                entries[key] = _entry(backend, symbol, signature, lines, lowered, taken)
            variant = Variant(schedule, tokens, entries[key])
            lowered.variants.setdefault(signature.name, []).append(variant)
    lowered.packed = _read(lowered.packed, entries.values())
    needed = {one.symbol for one in lowered.packed.values()}
    packers = {symbol: kernel for symbol, kernel in packers.items() if symbol in needed}
    lowered.kernels = {**_used(lowering.kernels, entries.values()), **packers}
    return lowered


def _taken(signature: Signature, names: Iterable[Mapping[str, str]]) -> list[str]:
    """The parameters of a function as they are packed: in all forms that its schedules read."""
    forms = (own.get(name, name) for own in names for name in signature.parameters)
    return list(dict.fromkeys(forms))


def _read(packed: Mapping[str, Packed], entries: Iterable[Entry]) -> dict[str, Packed]:
    """Those that a function takes: of a parameter in several forms there may be more."""
    named = {name for entry in entries for name in entry.parameters}
    return {name: one for name, one in packed.items() if name in named}


def _used(kernels: Mapping[str, Kernel], entries: Iterable[Entry]) -> dict[str, Kernel]:
    """The kernels that entries call, or that those call: folding leaves some that nobody does."""
    named = {symbol for entry in entries for symbol in entry.kernels}
    named |= {symbol for name in named for symbol in kernels[name].needs}
    return {symbol: kernel for symbol, kernel in kernels.items() if symbol in named}


def _symbol(shape: str, function: str, entries: dict[Any, Entry]) -> str:
    count = sum(name == function for name, _ in entries)
    return f"{shape}_{function}" + (f"_{count}" if count else "")


def _entry(
    backend: Backend,
    symbol: str,
    signature: Signature,
    lines: Wiring,
    lowered: Lowered,
    taken: Iterable[str],
) -> Entry:
    arguments, packed = ports(lowered.spec), lowered.packed
    parameters = {n: Buf(n, packed[n].shape, packed[n].dtype) for n in taken}
    return backend.entry(
        symbol,
        lines,
        {name: arguments[name] for name in signature.inputs},
        parameters,
        {name: arguments[name] for name in signature.outputs},
    )


def ports(spec: MoESpec) -> dict[str, Buf]:
    """Inputs and outputs of a block's functions, as buffers that a caller owns."""
    hidden, top_k = spec.experts.hidden_size, spec.experts.top_k
    dtype = spec.dtype
    return {
        "x": Buf("x", (PerToken(), hidden), dtype, True),
        "topk_ids": Buf("topk_ids", (PerToken(), top_k), "int32", True),
        "topk_weights": Buf("topk_weights", (PerToken(), top_k), "float32", True),
        "y": Buf("y", (PerToken(), hidden), dtype, True),
        "token_ids": Buf("token_ids", (PerToken(),), "int32", True),
        "shared_x": Buf("shared_x", (PerToken(), hidden), dtype, True),
    }
