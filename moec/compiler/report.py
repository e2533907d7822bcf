"""What a compilation did, for people and for machines: shapes, files, time of each part."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..frontend import Model
from ..spec import MoESpec
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
        self._model, self._specs, self._clock = model, specs, clock
        self._observer, self._options = observer, options

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
        lines = [f"family   {self._model.family}, {len(layers)} MoE layers"]
        for name, spec in self._specs.items():
            e = spec.experts
            lines.append(
                f"shape    {name}: E={e.num_experts} K={e.top_k} H={e.hidden_size} "
                f"I={e.intermediate_size} {spec.dtype}"
            )
        if self.digest:
            lines += [f"wrote    {self.out}", f"digest   {self.digest}"]
        lines += self._times("time", self.seconds)
        lines += self._times("pass", dict(sorted(self.pass_seconds.items(), key=lambda i: -i[1])))
        lines.append(f"memory   {self.peak_bytes / 1e6:.0f} MB at most")
        return "\n".join(lines)

    @staticmethod
    def _times(label: str, table: Mapping[str, float]) -> list[str]:
        width = max(map(len, table), default=0)
        return [f"{label:<8} {part.ljust(width)} {s:8.2f} s" for part, s in table.items()]
