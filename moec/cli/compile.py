"""`moec compile`: a checkpoint's MoE layers into an artifact."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..errors import UsageError
from .console import Console

_LAYERS = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


def run(args: argparse.Namespace, console: Console) -> int:
    """Compile and print the report."""
    layers = parse_layers(args.layers) if args.layers is not None else None
    from .. import compiler

    options = compiler.CompileOptions(
        family_file=args.family,
        allow_nonfinite=args.allow_nonfinite,
        dump_ir=args.dump_ir,
        print_ir_after=args.print_ir_after,
        stop_after=args.stop_after,
        time_passes=args.time_passes,
        dry_run=args.dry_run,
        progress=console.progress,
    )
    report = compiler.compile(
        args.checkpoint,
        target=args.target or "cpu",
        out=args.out or default_out(args.checkpoint),
        layers=layers,
        schedules=args.schedule,
        weights=args.weights,
        force=args.force,
        options=options,
    )
    if args.json:
        console.json(report.to_json())
    else:
        console.data(report.text())
    return 0


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers of "0-3,7", ascending; UsageError for anything else."""
    layers: set[int] = set()
    for part in text.split(","):
        match = _LAYERS.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UsageError(
                f"{part.strip()!r} is neither a layer nor a range of layers",
                where="--layers",
                need="numbers and ranges, as 0-3,7",
            )
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def default_out(checkpoint: str) -> str:
    """NAME.moec in the current folder, NAME being the checkpoint's folder."""
    return f"{Path(checkpoint).resolve().name or 'model'}.moec"
