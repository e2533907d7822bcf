"""`moec targets`: what can be compiled for, what runs here and why not, and the schedules."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from .. import target
from .console import Console
from .here import reason

_WIDTH = 100


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
    head = f"{'kind':6}{'schedule':11}{'chosen for':20}"
    console.data(head.rstrip())
    for kind, table in facts["schedules"].items():
        for name, fact in table.items():
            doc = fact["doc"] + ("" if fact["deterministic"] else "; not deterministic")
            start = f"{kind:6}{name:11}{fact['tokens']:20}"
            lines = textwrap.wrap(
                doc, _WIDTH, initial_indent=start, subsequent_indent=" " * len(head)
            )
            console.data("\n".join(lines))
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
            "reason": reason(requires),
        }
    for name in target.GPUS:
        resolved = target.resolve(f"cuda:{name}")
        table[f"cuda:{name}" + (" (= cuda)" if name == target.GPUS[0] else "")] = {
            "arch": resolved.arch,
            "kernels": _code(resolved),
            "reason": reason({"os": resolved.os, "arch": resolved.arch, "gpu": resolved.isa}),
        }
    metal = target.resolve("metal")
    table["metal"] = {
        "arch": metal.arch,
        "kernels": "MSL 2.3",
        "reason": reason({"os": metal.os, "arch": metal.arch}),
    }
    return table


# of a weight, where it does not have those of the checkpoint alone
_BITS = {
    target.Form.PLAIN: "",
    target.Form.COMPACT: ", 12 bits",
    target.Form.BOTH: ", 12 and 16 bits",
}


def _code(resolved: target.Target) -> str:
    kind = "PTX" if resolved.isa.startswith("compute") else "cubins"
    return f"{kind} of {resolved.isa}{_BITS[resolved.form]}"


def schedules() -> dict[str, dict[str, dict[str, Any]]]:
    """Every schedule by kind of target and name, and the T for which it is chosen.

    A name for several schedules comes first, with their names.
    """
    from ..schedules import backend

    table: dict[str, dict[str, dict[str, Any]]] = {}
    for kind in target.KINDS:
        own = backend(kind)
        rows = table[kind] = {}
        for name, members in own.strategies.items():
            yes = all(own.schedules[m].deterministic for m in members)
            doc = f"those of {', '.join(members)} that fit the block and the target"
            rows[name] = {"tokens": "any T", "deterministic": yes, "doc": doc}
        for name, schedule in own.schedules.items():
            if schedule.span is not None:
                tokens = "by rows per expert"
            else:
                tokens = str(schedule.tokens) if schedule.tokens else "by name only"
            rows[name] = {
                "tokens": tokens,
                "deterministic": schedule.deterministic,
                "doc": schedule.doc.splitlines()[0],
            }
    return table
