"""The quickstart's result for people: one table, and how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .runs import Row

_HEAD = ("schedule", "T", "time", "GB/s", "of read", "GFLOP/s", "of peak", "error", "ok")


def text(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """Machine, layer, table and legend, at most 80 columns wide."""
    read, peak = facts["read_bytes_per_second"], facts["flops_per_second"]
    e, dtype = facts["spec"]["experts"], facts["spec"]["dtype"]
    cells = [_HEAD, *(_cells(row, read, peak) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(_HEAD))]
    lines = [
        f"layer    {facts['family']}: E={e['num_experts']} K={e['top_k']} H={e['hidden_size']} "
        f"I={e['intermediate_size']} {dtype}, artifact {facts['digest'][:12]}",
        f"machine  {facts['target']}, {facts['threads']} threads: reads {read / 1e9:.1f} GB/s, "
        f"peak {peak / 1e9:.0f} GFLOP/s",
        "",
    ]
    for index, row in enumerate(cells):
        if index > 1 and row[1] != cells[index - 1][1]:
            lines.append("")
        aligned = [row[0].ljust(widths[0])]
        aligned += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(aligned).rstrip())
    right = sum(row.ok for row in rows)
    lines += [
        "",
        "machine: measured just now, by loops of our own.",
        "time: median of a whole block, routing included.  GB/s: weights of the chosen",
        "experts, each read once.  of read: of reading them from memory; above 1 where a",
        "cache has them, or where 16 bits are packed in 12.  error: |y - ref| / |ref|,",
        "ref in float64.",
        f"{right} of {len(rows)} results right.",
    ]
    return "\n".join(lines)


def _cells(row: Row, read: float, peak: float) -> tuple[str, ...]:
    rate, speed = row.bytes / row.seconds, row.flops / row.seconds
    return (
        row.schedule,
        str(row.tokens),
        f"{row.seconds * 1e3:.2f} ms",
        f"{rate / 1e9:.1f}",
        f"{rate / read:.2f}",
        f"{speed / 1e9:.1f}",
        f"{speed / peak:.2f}",
        f"{row.error:.1e}",
        "ok" if row.ok else "WRONG",
    )
