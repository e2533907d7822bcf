"""`moec quickstart`: the main job from a checkpoint to checked and timed results."""

from __future__ import annotations

import argparse

from .console import Console


def run(args: argparse.Namespace, console: Console) -> int:
    """Run the quickstart; its exit code."""
    from .. import quickstart

    return int(quickstart.main(args.checkpoint, console, as_json=args.json))
