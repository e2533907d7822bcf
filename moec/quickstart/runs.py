"""One row for every schedule and T: the whole block, checked against float64 and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ..checkpoint import Checkpoint
from ..errors import CheckFailed
from ..frontend import Block as ModelBlock
from ..ops import reference
from ..runtime import Block
from ..spec import MoESpec

Array = np.ndarray[Any, np.dtype[Any]]

TOKENS = (1, 4, 16, 128, 512)
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# |y - ref| / |ref|: the output is rounded to 8 (bfloat16) or 11 bits, and so may be the
# activations between the two matmuls; float32 sums some thousand products in its own order.
_ALLOWED = {"float32": 1e-5, "float16": 2.0**-9, "bfloat16": 2.0**-7}
_INPUTS = 6  # different tokens in turn, so that other experts' weights come from memory
_SECONDS = 0.6
_MOST = 200


@dataclass(frozen=True)
class Row:
    """One measurement: seconds are the median call; bytes and flops those of the experts."""

    schedule: str
    tokens: int
    seconds: float
    bytes: float
    flops: float
    error: float
    allowed: float
    same_experts: float
    ok: bool

    def to_json(self) -> dict[str, Any]:
        """The row as plain data."""
        return asdict(self)


def measure_all(
    checkpoint: str,
    source: ModelBlock,
    block: Block,
    progress: Callable[[str], None],
    batches: Sequence[int] | None = None,
) -> list[Row]:
    """Every schedule at every T of `batches` (None: TOKENS), decode first."""
    spec = source.spec
    with Checkpoint.open(checkpoint) as opened:
        parameters = {name: source.plan.tensor(opened, name) for name, _ in source.plan.params}
    random = np.random.default_rng(1)
    rows = []
    for tokens in TOKENS if batches is None else batches:
        xs = [
            random.standard_normal((tokens, spec.experts.hidden_size)).astype(_DTYPES[spec.dtype])
            for _ in range(_INPUTS)
        ]
        progress(f"reference in float64 for T = {tokens}")
        ids, weights = block.route(xs[0])
        want_ids, _ = reference.route(spec, parameters, xs[0])
        want = reference.moe(spec, parameters, xs[0], (ids, weights))
        same = float((np.sort(ids, 1) == np.sort(want_ids, 1)).all(1).mean())
        active = [np.unique(block.route(x)[0]).size for x in xs]
        for schedule in block.schedules():
            progress(f"schedule {schedule}, T = {tokens}")
            y = block(xs[0], schedule=schedule).astype(np.float64)
            error = float(np.linalg.norm(y - want) / np.linalg.norm(want))
            allowed = _ALLOWED[spec.dtype]
            seconds = _time(block, xs, schedule)
            rows.append(
                Row(
                    schedule=schedule,
                    tokens=tokens,
                    seconds=seconds,
                    bytes=float(np.mean(active)) * _expert_bytes(spec),
                    flops=2.0 * tokens * spec.experts.top_k * _expert_elements(spec),
                    error=error,
                    allowed=allowed,
                    same_experts=same,
                    # A few close calls may fall the other way when logits are rounded.
                    ok=bool(error <= allowed) and same >= 0.98,
                )
            )
    return rows


def demand_right(rows: Sequence[tuple[str, Row]]) -> None:
    """CheckFailed when a row is wrong; each comes with the layer that it is of, or ""."""
    wrong = [(layer, row) for layer, row in rows if not row.ok]
    if wrong:
        layer, row = wrong[0]
        raise CheckFailed(
            f"{len(wrong)} of {len(rows)} results differ from the float64 reference",
            where=f"first: {layer}schedule {row.schedule}, T = {row.tokens}",
            need=f"a relative error of at most {row.allowed:.1e}",
            hint="this is a bug in moec, please report it with the table and 'moec env'",
        )


def _expert_elements(spec: MoESpec) -> int:
    e = spec.experts
    return (e.gate_up_rows + e.intermediate_size) * e.hidden_size


def _expert_bytes(spec: MoESpec) -> int:
    dtype: np.dtype[Any] = np.dtype(_DTYPES[spec.dtype])
    return _expert_elements(spec) * dtype.itemsize


def _time(block: Block, xs: list[Array], schedule: str) -> float:
    out = np.empty_like(xs[0])
    for x in xs:
        block(x, out, schedule)
    times: list[float] = []
    while len(times) < len(xs) or (sum(times) < _SECONDS and len(times) < _MOST):
        x = xs[len(times) % len(xs)]
        start = time.perf_counter()
        block(x, out, schedule)
        times.append(time.perf_counter() - start)
    return float(np.median(times))
