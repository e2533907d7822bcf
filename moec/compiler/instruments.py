"""Looking inside a compilation: IR dumps, IR after one pass, time of every pass.

All of it is TVM pass instruments and named steps, none of it is inside passes.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tvm
from tvm.ir.instrument import pass_instrument

from ..errors import UsageError
from .options import CompileOptions


@pass_instrument
class _Watch:
    """Tells an Observer when a pass begins and ends."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def run_before_pass(self, module: Any, info: Any) -> None:
        """Start the clock of a pass."""
        self.observer.begin(str(info.name))

    def run_after_pass(self, module: Any, info: Any) -> None:
        """Stop it, and show the IR where that was asked for."""
        self.observer.end(str(info.name), module)


class Observer:
    """Collects times and IR of one compilation, as its options ask for."""

    def __init__(self, options: CompileOptions) -> None:
        self._options = options
        self._started: list[float] = []
        self._dumped = 0
        self._shape = ""
        self.times: dict[str, float] = {}  # pass -> seconds, passes within it included
        self.shown: list[str] = []  # IR texts that were asked for
        self._folder = _folder(options.dump_ir)

    @contextlib.contextmanager
    def passes(self, shape: str) -> Iterator[None]:
        """Watch every pass that runs inside; `shape` names the dumps."""
        self._shape = shape
        with tvm.transform.PassContext(opt_level=3, instruments=[_Watch(self)]):
            yield

    def begin(self, name: str) -> None:
        """A pass begins."""
        self._started.append(time.perf_counter())

    def end(self, name: str, module: Any) -> None:
        """A pass ends with `module`."""
        seconds = time.perf_counter() - self._started.pop()
        self.times[name] = self.times.get(name, 0.0) + seconds
        self.show(name, module)

    def show(self, name: str, module: Any) -> None:
        """Dump or keep the IR of a step, if that was asked for."""
        if self._folder is not None:
            # Functions outside a module have no other text that parses.
            file = self._folder / f"{self._dumped:03d}-{self._shape}-{_plain(name)}.py"
            file.write_text(module.script() + "\n", encoding="utf-8")
            self._dumped += 1
        if name == self._options.print_ir_after:
            self.shown.append(f"# {self._shape} after {name}\n{module.script()}")

    def check(self) -> None:
        """Raise UsageError when the pass whose IR was asked for never ran."""
        wanted = self._options.print_ir_after
        if wanted is not None and wanted not in self.times and not self.shown:
            own = [name for name in self.times if "." not in name or name.startswith("moec.")]
            raise UsageError(
                f"no pass {wanted!r} ran",
                where="print_ir_after",
                need="one of " + ", ".join(own) if own else "a pass that runs before the stop",
                hint="--time-passes lists every pass that runs, those of TVM included",
            )


def _folder(path: Any) -> Path | None:
    if path is None:
        return None
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write: {error.strerror}", where=str(folder)) from None
    return folder


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)
