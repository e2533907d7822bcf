"""`moec selftest`: every schedule of a target on this machine, checked and timed."""

from __future__ import annotations

import argparse

from .console import Console


def run(args: argparse.Namespace, console: Console) -> int:
    """Run the self test; its exit code."""
    from .. import selftest

    return int(selftest.main(args.target, console, speed=not args.quick, as_json=args.json))
