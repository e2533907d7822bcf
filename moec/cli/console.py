"""What goes to the terminal: errors, progress and details on stderr, data on stdout."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

_NARROWEST = 16  # columns; a narrower last column is easier to read unwrapped
_BOLD_RED, _PLAIN = "\x1b[1;31m", "\x1b[0m"


class Console:
    """One command's view of the terminal.

    Progress is a single line that rewrites itself; it is off with `quiet` and when stderr is
    no terminal. Colour is off when NO_COLOR is set.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self._verbose = verbose
        terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._live = terminal and not quiet
        self._colour = terminal and not os.environ.get("NO_COLOR")
        self._drawn = False

    def progress(self, text: str) -> None:
        """Show what is being done now, in place of the progress shown before."""
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{text[:width]}")
            sys.stderr.flush()
            self._drawn = True

    def clear(self) -> None:
        """Remove the progress line."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._drawn = False

    def line(self, text: str) -> None:
        """A line on stderr."""
        self.clear()
        print(text, file=sys.stderr)

    def detail(self, text: str) -> None:
        """A line on stderr with -v only."""
        if self._verbose:
            self.line(text.rstrip())

    def error(self, text: str) -> None:
        """The error of a command, its first line led by "moec: error:"."""
        label = "moec: error:"
        self.line(f"{_BOLD_RED}{label}{_PLAIN} {text}" if self._colour else f"{label} {text}")

    def data(self, text: str) -> None:
        """A result, on stdout."""
        self.clear()
        print(text)

    def json(self, value: Any) -> None:
        """A result as JSON, on stdout."""
        self.data(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Rows with aligned columns, on stdout; the first row is the heading.

        On a terminal the last column is wrapped to its width; in a pipe a row is one line.
        """
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        indent = sum(widths) + 2 * len(widths)
        room = shutil.get_terminal_size().columns - indent if sys.stdout.isatty() else 0
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            last = textwrap.wrap(row[-1], room) if room >= _NARROWEST else []
            text = f"\n{' ' * indent}".join(last or [row[-1]])
            self.data("  ".join([*cells, text]).rstrip())
