"""Copying one canonical parameter out of the mapped files, tile by tile, judged for NaN."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from ..checkpoint import Checkpoint
from ..errors import BadWeights
from ..spec import FLOAT_DTYPES
from .pieces import Array, ParamPlan

_TILE = 128
_CHUNK = 1 << 18
# The exponent bits that only Inf and NaN have; testing them is several times faster than
# isfinite on a 16-bit float.
_EXPONENT = {np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy (or ml_dtypes) dtype of one of FLOAT_DTYPES; BadWeights for another name."""
    if name == "int32":
        return np.dtype(np.int32)
    if name not in FLOAT_DTYPES:
        raise BadWeights(f"the dtype {name!r} is not supported", need=", ".join(FLOAT_DTYPES))
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def fill(
    checkpoint: Checkpoint, plan: ParamPlan, expert: int, out: Array, allow_nonfinite: bool
) -> None:
    """Write what `plan` says of `expert` into `out`, a C-contiguous array of plan.canonical."""
    for piece in plan.of(expert):
        source = piece.name(expert)
        array = checkpoint.read(source)
        where = str(checkpoint.path / checkpoint.tensors[source].file)
        if array.shape != piece.shape:
            raise BadWeights(
                f"tensor {source!r} has the shape {list(array.shape)}",
                where=where,
                need=str(list(piece.shape)),
            )
        target = out[piece.rows[0] : piece.rows[1]]
        cut = piece.cut(array, expert).reshape(target.shape)
        table = plan.dtype == "int32" and array.dtype in (np.int32, np.int64)
        if table:
            _fill_table(target, cut, source, where)
            continue
        if not plan.is_vector and array.dtype != out.dtype:
            raise BadWeights(
                f"tensor {source!r} is {array.dtype.name}", where=where, need=out.dtype.name
            )
        if plan.is_vector:
            target[...] = cut.astype(np.float32)
        else:
            _copy(target, cut)
        if not allow_nonfinite and not _finite(target):
            raise BadWeights(
                f"tensor {source!r} holds NaN or Inf",
                where=where,
                need="finite weights",
                hint="download the file again, or pass --allow-nonfinite to take it as it is",
            )
    checkpoint.verify_unchanged()


def _fill_table(target: Array, source: Array, name: str, where: str) -> None:
    if source.size and not 0 <= int(source.min()) <= int(source.max()) < 1 << 31:
        raise BadWeights(f"tensor {name!r} holds an entry that is no expert id", where=where)
    target[...] = source


def _copy(target: Array, source: Array) -> None:
    # As unsigned integers: ml_dtypes copies element by element. A transposed copy goes by
    # tiles, because a whole row of the source would leave the cache before its next use.
    bits = np.dtype(f"u{target.dtype.itemsize}")
    target, source = target.view(bits), source.view(bits)
    if source.ndim != 2 or abs(source.strides[0]) >= abs(source.strides[1]):
        target[...] = source
        return
    for i in range(0, source.shape[0], _TILE):
        for j in range(0, source.shape[1], _TILE):
            target[i : i + _TILE, j : j + _TILE] = source[i : i + _TILE, j : j + _TILE]


def _finite(array: Array) -> bool:
    mask = _EXPONENT.get(array.dtype)
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        if mask is None:
            if not np.isfinite(part).all():
                return False
        elif int((part.view(np.uint16) & np.uint16(0x7FFF)).max()) >= mask:
            return False
    return True
