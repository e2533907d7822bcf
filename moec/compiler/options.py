"""What a compilation can be told besides checkpoint, target and output."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UsageError

# In order; a compilation can stop after any of them.
STAGES = ("graph", "passes", "legalized", "library")
WEIGHTS = ("pack", "reference")


def _silent(_: str) -> None:
    """Progress that nobody asked for."""


@dataclass(frozen=True)
class CompileOptions:
    """How to compile, and what to show of it.

    `family_file` describes the model family in place of the built-in table. `dump_ir` is a
    folder for the IR after every pass, `print_ir_after` a pass whose IR goes into the report,
    `stop_after` one of STAGES, `dry_run` says what would be done and writes nothing.
    `progress` is called with a line of text whenever something new begins.
    """

    family_file: str | os.PathLike[str] | None = None
    allow_nonfinite: bool = False
    dump_ir: str | os.PathLike[str] | None = None
    print_ir_after: str | None = None
    stop_after: str | None = None
    time_passes: bool = False
    dry_run: bool = False
    progress: Callable[[str], None] = _silent

    def __post_init__(self) -> None:
        if self.stop_after is not None and self.stop_after not in STAGES:
            raise UsageError(
                f"there is no stage {self.stop_after!r}", where="stop_after", need=", ".join(STAGES)
            )

    def stops_after(self, stage: str) -> bool:
        """Whether the compilation ends with `stage`."""
        return self.stop_after == stage
