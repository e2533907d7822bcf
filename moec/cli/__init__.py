"""The command line: `main(argv)` returns the exit code and raises nothing.

stdout carries data only, stderr errors and progress. Exit codes: 0 ok, 1 bug, 2 usage, 3 bad
input, 4 target, 5 check failed, 6 resources, 130 interrupted, 141 nobody reads the output.
Every verb is a module with `run(args, console) -> int`, imported when it is used.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from ..errors import MoecError, ResourceError
from .console import Console
from .parser import build

_INTERRUPTED = 130
_NO_READER = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv` (default: that of the process); the exit code."""
    try:
        args = build().parse_args(argv)
    except SystemExit as stop:  # argparse has written why
        return stop.code if isinstance(stop.code, int) else 0
    console = Console(quiet=args.quiet, verbose=args.verbose)
    try:
        code = _run(args, console)
        sys.stdout.flush()
        return code
    except MoecError as error:
        return _report(error, console)
    except MemoryError:
        return _report(ResourceError("memory ran out", hint="give the process more"), console)
    except KeyboardInterrupt:
        console.line("moec: interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        # Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NO_READER
    except Exception as error:
        console.error(f"{type(error).__name__}: {error}")
        console.line(
            "  try  'moec -v ...' for the traceback; this is a bug in moec, please report it"
        )
        console.detail(traceback.format_exc())
        return 1


def _run(args: argparse.Namespace, console: Console) -> int:
    verb = importlib.import_module(f".{args.verb}", __name__)
    try:
        return int(verb.run(args, console))
    finally:
        console.clear()


def _report(error: MoecError, console: Console) -> int:
    console.error(str(error))
    console.detail(traceback.format_exc())
    return error.exit_code
