"""What a compilation did, for people and for machines: shapes, files, time of each part."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..frontend import Model
from ..schedules import Chosen
from ..spec import MoESpec
from ..text import ranges
from .instruments import Observer
from .options import CompileOptions


class Clock:
    """Adds up the seconds of every part, and says aloud which one runs."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str, what: str = "") -> Iterator[None]:
        """Time what runs inside under `part`; `what` says more in the progress line."""
        self._progress(f"{part}: {what}" if what else part)
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[part] = self.seconds.get(part, 0.0) + spent


class Report:
    """The result of `moec.compile`: `digest` is None when nothing was written."""

    def __init__(
        self,
        out: str,
        model: Model,
        specs: Mapping[str, MoESpec],
        clock: Clock,
        observer: Observer,
        options: CompileOptions,
    ) -> None:
        self.out = out
        self.digest: str | None = None
        self.ir: tuple[str, ...] = ()
        self.seconds: dict[str, float] = {}
        self.pass_seconds: dict[str, float] = {}
        self.peak_bytes = 0
        self.targets: dict[str, dict[str, dict[str, str]]] = {}
        self._model, self._specs, self._clock = model, specs, clock
        self._observer, self._options = observer, options

    def add(self, target: str, schedules: Mapping[str, Chosen]) -> None:
        """Take down which schedules a target's shapes are compiled with, and for which T."""
        self.targets[target] = {
            shape: {s.name: str(tokens) if tokens else "by name" for s, tokens in chosen}
            for shape, chosen in schedules.items()
        }

    def finish(self, digest: str | None = None) -> Report:
        """Take the figures; raises UsageError when a pass to be shown never ran."""
        if not self._options.dry_run:
            self._observer.check()
        self.digest = digest
        self.ir = tuple(self._observer.shown)
        self.seconds = dict(self._clock.seconds)
        if self._options.time_passes:
            self.pass_seconds = dict(self._observer.times)
        unit = 1 if sys.platform == "darwin" else 1024
        self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return self

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "out": self.out,
            "digest": self.digest,
            "family": self._model.family,
            "layers": [block.layer for block in self._model.blocks],
            "shapes": {name: spec.to_json() for name, spec in self._specs.items()},
            "targets": self.targets,
            "seconds": self.seconds,
            "pass_seconds": self.pass_seconds,
            "peak_bytes": self.peak_bytes,
            "ir": list(self.ir),
        }

    def text(self) -> str:
        """The report for a terminal; with IR, only the IR."""
        if self.ir:
            return "\n\n".join(self.ir)
        layers = [block.layer for block in self._model.blocks]
        lines = [f"family   {self._model.family}, MoE layers {ranges(layers)} ({len(layers)})"]
        for name, spec in self._specs.items():
            e = spec.experts
            lines.append(
                f"shape    {name}: E={e.num_experts} K={e.top_k} H={e.hidden_size} "
                f"I={e.intermediate_size} {spec.dtype}"
            )
        for target, shapes in self.targets.items():
            lines += [
                f"target   {target}: {shape} by " + ", ".join(f"{n} ({t})" for n, t in own.items())
                for shape, own in shapes.items()
            ]
        lines += self._written()
        width = max(map(len, self.seconds), default=0)
        lines += [f"time     {part.ljust(width)} {s:7.2f} s" for part, s in self.seconds.items()]
        width = max(map(len, self.pass_seconds), default=0)
        slowest = sorted(self.pass_seconds.items(), key=lambda item: -item[1])
        lines += [f"pass     {name.ljust(width)} {s * 1e3:9.1f} ms" for name, s in slowest]
        lines.append(f"memory   {self.peak_bytes / 1e6:.0f} MB at most")
        return "\n".join(lines)

    def _written(self) -> list[str]:
        if self.digest:
            return [f"wrote    {self.out}", f"digest   {self.digest}"]
        return [f"wrote    nothing; without --dry-run or --stop-after it would be {self.out}"]
