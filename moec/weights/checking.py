"""What differs between a plan and the headers of a checkpoint; reads no tensor data."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from ..checkpoint import Checkpoint
from ..errors import BadWeights
from ..spec import FLOAT_DTYPES
from .pieces import Axis, ParamPlan, Piece

SHOWN = 5


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the weights of a block, in which file, and what fits."""

    text: str
    file: str | None = None
    need: str | None = None

    def __str__(self) -> str:
        return self.text + (f" (need {self.need})" if self.need else "")


def weights_error(problems: list[Problem], checkpoint: Checkpoint) -> BadWeights:
    """One BadWeights for a non-empty list: the first five in full, then how many there are."""
    first = problems[0]
    where = str(checkpoint.path / first.file) if first.file else str(checkpoint.path)
    hint = f"download the file again; 'moec inspect {checkpoint.path}' lists every problem"
    if len(problems) == 1:
        return BadWeights(first.text, where=where, need=first.need, hint=hint)
    lines = [f"{len(problems)} problems with the weights:"]
    lines += [f"  - {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  - and {len(problems) - SHOWN} more")
    return BadWeights("\n".join(lines), where=where, need=first.need, hint=hint)


def source_problems(name: str, plan: ParamPlan, checkpoint: Checkpoint) -> Iterator[Problem]:
    """Sources of parameter `name` that are missing, of another shape, or of another dtype."""
    seen: set[str] = set()
    for expert in range(plan.experts):
        for piece in plan.of(expert):
            source = piece.name(expert)
            if source not in seen:
                seen.add(source)
                yield from _compare(checkpoint, name, plan, piece, source)


def readable(plan: ParamPlan) -> tuple[str, ...]:
    """The dtypes on disk from which a parameter can be read."""
    if plan.dtype == "int32":
        return ("int32", "int64")
    return FLOAT_DTYPES if plan.is_vector else (plan.dtype,)


def _compare(
    checkpoint: Checkpoint, name: str, plan: ParamPlan, piece: Piece, source: str
) -> Iterator[Problem]:
    info = checkpoint.tensors.get(source)
    dtypes = readable(plan)
    need = f"{list(piece.shape)} {' or '.join(dtypes)}"
    if info is None:
        yield Problem(f"tensor {source!r} is missing", None, need)
    elif info.shape != piece.shape:
        yield Problem(f"tensor {source!r} has the shape {list(info.shape)}", info.file, need)
    elif info.dtype not in (*FLOAT_DTYPES, *dtypes):
        yield Problem(f"tensor {source!r} has the unsupported dtype {info.dtype}", info.file, need)
    elif info.dtype not in dtypes:
        yield Problem(f"tensor {source!r} of {name} is {info.dtype}", info.file, need)


def use_problems(
    params: tuple[tuple[str, ParamPlan], ...],
    owns: tuple[str, ...],
    spare: tuple[str, ...],
    checkpoint: Checkpoint,
) -> Iterator[Problem]:
    """Tensors of the block that are used twice, used in part, or not used at all."""
    used: Counter[str] = Counter()
    cuts: defaultdict[str, set[tuple[Axis, ...]]] = defaultdict(set)
    sizes: dict[str, int] = {}
    for _, plan in params:
        for piece in plan.pieces:
            named = "{e}" in piece.tensor
            first, last = piece.experts or (0, plan.experts)
            each = piece.elements() * (1 if named else last - first)
            for expert in range(first, last if named else first + 1):
                source = piece.name(expert)
                used[source] += each
                sizes[source] = math.prod(piece.shape)
                if piece.index in cuts[source]:
                    yield Problem(f"the same part of {source!r} is used twice")
                cuts[source].add(piece.index)
    for source, count in used.items():
        info = checkpoint.tensors.get(source)
        if info is not None and count != sizes[source]:
            text = f"{count} of the {sizes[source]} elements of {source!r} are used"
            yield Problem(text, info.file, "every element used once")
    unread = set(spare)
    for prefix in owns:
        for name in checkpoint.names_under(prefix):
            if name not in used and name not in unread:
                info = checkpoint.tensors[name]
                text = f"tensor {name!r} {list(info.shape)} {info.dtype} is not used by anything"
                yield Problem(text, info.file, "only tensors that the family knows")
