"""Markdown tables of a side-by-side run: the JSON of a peer harness that ran peers_hook.py.

    python bench/peers_table.py RUN.json [RUN.json ...] > TABLES.md

Where a cell was measured in several runs, the last one given counts.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

MOEC, WRONG = "hook", 2e-2


def main(paths: list[str]) -> None:
    """Print a table a shape and what the cells have in common."""
    cells: dict[tuple[str, int, str], dict[str, Any]] = {}
    for path in paths:
        for record in json.loads(Path(path).read_text()):
            cells[record["shape"], record["T"], record["peer"]] = record
    ratios: list[float] = []
    for shape in dict.fromkeys(key[0] for key in cells):
        mine = {key[1:]: r["us"] for key, r in cells.items() if key[0] == shape and good(r)}
        peers = [p for p in dict.fromkeys(key[2] for key in cells) if any(k[1] == p for k in mine)]
        rivals = [p for p in peers if p != MOEC and not p.startswith("bound:")]
        shown = [*rivals, *(p for p in peers if p.startswith("bound:"))]
        print(f"## {shape}\n\n| T | moec | best peer | moec / best | " + " | ".join(shown) + " |")
        print("|---" * (len(shown) + 4) + "|")
        own = []
        for T in sorted({t for t, _ in mine}):
            best = min((p for p in rivals if (T, p) in mine), key=lambda p: mine[T, p], default="")
            moec = mine.get((T, MOEC))
            line = [str(T), text(moec), best, "-"]
            if moec and best:
                own.append(moec / mine[T, best])
                line[3] = f"{own[-1]:.2f}"
            print("| " + " | ".join([*line, *(text(mine.get((T, p))) for p in shown)]) + " |")
        if own:
            print(f"\nGeometric mean {mean(own):.3f}, worst {max(own):.3f}.\n")
        ratios += own
    errors = [r["err"] for key, r in cells.items() if key[2] == MOEC and r.get("err") is not None]
    if ratios:
        print(
            f"All {len(ratios)} cells: geometric mean {mean(ratios):.3f}, worst {max(ratios):.3f}."
        )
    if errors:
        print(f"Errors of moec against float32: {min(errors):.1e} to {max(errors):.1e}.")


def good(record: dict[str, Any]) -> bool:
    """Whether a record is a time of a right result (bounds have none)."""
    error = record.get("err")
    return "us" in record and (error is None or error < WRONG)


def text(us: float | None) -> str:
    """Microseconds of a cell."""
    return "-" if us is None else f"{us:.1f}"


def mean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


if __name__ == "__main__":
    main(sys.argv[1:])
