"""`moec targets`: what can be compiled for, what runs here and why not, and the schedules."""

from __future__ import annotations

import argparse
from typing import Any

from .. import host, target
from .console import Console


def run(args: argparse.Namespace, console: Console) -> int:
    """Print targets and schedules."""
    facts = {"targets": targets(), "schedules": schedules()}
    if args.json:
        console.json(facts)
        return 0
    rows = [("target", "arch", "kernels", "runs here")]
    for name, fact in facts["targets"].items():
        runs = "yes" if fact["reason"] is None else f"no: {fact['reason']}"
        rows.append((name, fact["arch"], fact["kernels"], runs))
    console.table(rows)
    console.data("")
    rows = [("schedule", "chosen for", "deterministic", "")]
    for name, fact in facts["schedules"].items():
        yes = "yes" if fact["deterministic"] else "no"
        rows.append((name, fact["tokens"], yes, fact["doc"]))
    console.table(rows)
    return 0


def targets() -> dict[str, dict[str, Any]]:
    """Every known target by the name that --target takes; "cpu" is this machine's."""
    from ..schedules.cpu.isa import ISAS

    here = target.host_cpu()
    table = {}
    for name in target.CPUS:
        resolved = target.resolve(f"cpu:{name}")
        requires = {
            "os": resolved.os,
            "arch": resolved.arch,
            "features": ISAS[resolved.isa].features,
        }
        table[f"cpu:{name}" + (" (= cpu)" if name == here else "")] = {
            "arch": resolved.arch,
            "kernels": resolved.isa,
            "reason": host.missing(requires),
        }
    metal = target.resolve("metal")
    table["metal"] = {
        "arch": metal.arch,
        "kernels": "MSL 2.3",
        "reason": host.missing({"os": metal.os, "arch": metal.arch}),
    }
    return table


def schedules() -> dict[str, dict[str, Any]]:
    """Every CPU schedule by name, and the T for which it is chosen."""
    from ..schedules.cpu import SCHEDULES

    table = {}
    for name, schedule in SCHEDULES.items():
        table[name] = {
            "tokens": str(schedule.tokens) if schedule.tokens else "by name only",
            "deterministic": schedule.deterministic,
            "doc": schedule.doc.splitlines()[0],
        }
    return table
