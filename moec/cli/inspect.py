"""`moec inspect`: what a checkpoint or an artifact holds, without loading code of it."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..artifact import Artifact, Function, Manifest
from ..artifact.manifest import MANIFEST
from ..errors import BadWeights
from ..text import ranges, size
from .console import Console
from .here import reason


def run(args: argparse.Namespace, console: Console) -> int:
    """Describe PATH; an artifact's files are not hashed ('moec verify' does that).

    A checkpoint whose weights do not fit its config is described all the same, with every
    problem, before the error (exit code 3).
    """
    if os.path.exists(os.path.join(args.path, MANIFEST)):  # never raises, as Path.exists may
        artifact = Artifact.open(args.path, verify="manifest")
        if args.json:
            console.json(describe(artifact))
        else:
            _print(artifact, console)
        return 0
    from ..frontend import report, survey

    console.progress("reading headers")
    model = survey(args.path, args.family)
    if args.json:
        console.json(report.describe(model))
    else:
        console.data(report.text(model))
    if model.problems:
        count = len(model.problems)
        raise BadWeights(
            f"the weights have {count} problem{'' if count == 1 else 's'}; they are listed above",
            where=str(args.path),
            need="tensors that fit the config",
            hint="download the checkpoint again",
        )
    return 0


def describe(artifact: Artifact) -> dict[str, Any]:
    """Facts about an artifact as plain data."""
    m = artifact.manifest
    return {
        "kind": "artifact",
        "digest": m.digest,
        "producer": dict(m.producer),
        "source": dict(m.source),
        "weights": {"mode": m.weights.mode, "target": m.weights.target},
        "bytes": sum(entry.bytes for entry in m.files.values()),
        "layers": [{"layer": b.layer, "shape": b.shape} for b in m.blocks],
        "shapes": {name: shape.spec.to_json() for name, shape in m.shapes.items()},
        "targets": {
            name: {
                "device": target.device,
                "requires": dict(target.requires),
                "runs_here": reason(target.requires) is None,
                "functions": {
                    key: {fn: _variants(f) for fn, f in compiled.functions.items()}
                    for key, compiled in target.shapes.items()
                },
            }
            for name, target in m.targets.items()
        },
    }


def _variants(function: Function) -> list[dict[str, Any]]:
    return [
        {"schedule": v.schedule, "tokens": v.tokens, "deterministic": v.deterministic}
        for v in function.variants
    ]


def _print(artifact: Artifact, console: Console) -> None:
    m = artifact.manifest
    made = ", ".join(f"{name} {version}" for name, version in sorted(m.producer.items()))
    console.data(f"artifact  {artifact.path}")
    console.data(f"digest    {m.digest}")
    console.data(f"made by   {made}")
    console.data(f"family    {m.source.get('family', '-')}")
    console.data(
        f"size      {size(sum(e.bytes for e in m.files.values()))}, weights: {_weights(m)}"
    )
    for name, shape in m.shapes.items():
        e, layers = shape.spec.experts, [b.layer for b in m.blocks if b.shape == name]
        console.data(
            f"shape     {name}: E={e.num_experts} K={e.top_k} H={e.hidden_size} "
            f"I={e.intermediate_size} {shape.spec.dtype}, layers {ranges(layers)}"
        )
    for name, target in m.targets.items():
        console.data(f"target    {name}: {reason(target.requires) or 'runs here'}")
        for key, compiled in target.shapes.items():
            for function, f in compiled.functions.items():
                names = ", ".join(f"{v.schedule}{_tokens(v.tokens)}" for v in f.variants)
                console.data(f"  {key}.{function:<8}{names}")


def _weights(m: Manifest) -> str:
    if m.weights.mode == "reference":
        return "left in the checkpoint"
    return f"packed for {m.weights.target}"


def _tokens(span: tuple[int, int | None] | None) -> str:
    if span is None:
        return " (by name)"
    low, high = span
    if high is None:
        return "" if low == 0 else f" (T >= {low})"
    return f" ({low} <= T < {high})" if low else f" (T < {high})"
