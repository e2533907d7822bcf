"""moec quickstart: write (or take) a checkpoint, compile it, run every schedule, check and time."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import host
from ..runtime import load
from .runs import Row, demand_right, measure_all
from .table import text

if TYPE_CHECKING:
    from ..cli.console import Console

SCHEDULES = ("fused", "gather", "loop")


def main(checkpoint: str | None, console: Console, *, as_json: bool = False) -> int:
    """Run the quickstart on `checkpoint`, or on one that it writes; 0 when every row is right.

    Prints a table, or JSON. Raises CheckFailed when a result is wrong, and what compiling and
    loading raise, before them UsageError for a TVM_NUM_THREADS that is no number of threads.
    """
    host.threads()  # raises: not after minutes of compiling
    with _folder() as folder:
        if checkpoint is None:
            checkpoint = _made(folder, console)
        rows, facts = _job(checkpoint, folder / "quickstart.moec", console)
    if as_json:
        console.json({**facts, "rows": [row.to_json() for row in rows]})
    else:
        console.data(text(rows, facts))
    demand_right([("", row) for row in rows])
    return 0


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="moec-quickstart-") as name:
        yield Path(name)


def _made(folder: Path, console: Console) -> str:
    from . import made

    console.progress("writing a Qwen3-MoE-shaped checkpoint")
    path = folder / "tiny-qwen3-moe"
    path.mkdir()
    size = made.write(path)
    console.line(f"wrote a checkpoint of {size / 1e6:.0f} MB (2 layers, 1 of them MoE, bfloat16)")
    return str(path)


def _job(checkpoint: str, out: Path, console: Console) -> tuple[list[Row], dict[str, Any]]:
    from .. import compiler
    from ..frontend import read_model
    from .machine import measure

    model = read_model(checkpoint)
    block = model.blocks[0]
    options = compiler.CompileOptions(progress=console.progress)
    report = compiler.compile(
        checkpoint, out=out, layers=[block.layer], schedules=SCHEDULES, options=options
    )
    spent = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in report.seconds.items())
    others = f", and left {len(model.blocks) - 1} more MoE layers" if len(model.blocks) > 1 else ""
    console.line(f"compiled layer {block.layer}{others}: {spent}")
    console.progress("measuring the machine")
    machine = measure(block.spec.dtype)
    loaded = load(out)
    rows = measure_all(checkpoint, block, loaded[block.layer], console.progress)
    # Again: on a shared machine the first measure may have had less of it than the rows.
    console.progress("measuring the machine again")
    machine = machine.best(measure(block.spec.dtype))
    facts = {
        "family": model.family,
        "layer": block.layer,
        "digest": report.digest,
        "target": loaded.target,
        "threads": machine.threads,
        "compile_seconds": report.seconds,
        "read_bytes_per_second": machine.read,
        "flops_per_second": machine.flops,
        "spec": block.spec.to_json(),
    }
    return rows, facts
