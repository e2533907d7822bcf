"""Packing a layer at compile time: canonical weights, one expert at a time, into a weight file.

The same PrimFuncs that an artifact carries for packing at load are compiled here for this
machine, so that cross-compiling for another one packs too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm_ffi

from .. import host, target
from ..artifact import TensorFileWriter, aligned
from ..checkpoint import Checkpoint
from ..errors import TargetError
from ..schedules import Packed
from ..schedules.cpu.codegen import compile_module
from ..spec import MoESpec
from ..weights import WeightPlan

if TYPE_CHECKING:
    from .compile import TargetBuild

Array = np.ndarray[Any, np.dtype[Any]]
PLAIN_INSTEAD = "compile for cuda:sm_90a, whose weights are as the checkpoint has them"


class Packing:
    """The packing functions of a target's shapes, compiled for this machine."""

    def __init__(self, build: TargetBuild, specs: Mapping[str, MoESpec]) -> None:
        kernels: dict[str, Any] = {}
        for shape, spec in specs.items():
            _, own = build.backend.packing(spec, build.target, shape)
            kernels.update({symbol: kernel.func for symbol, kernel in own.items()})
        self._module = compile_module(kernels, target.resolve("cpu")) if kernels else None
        self._threads = host.cores()

    def run(self, symbol: str, source: Array, out: Array, what: str) -> None:
        """Write the packed form of `source` to `out`; both are C-contiguous.

        Raises TargetError, which names `what`, for weights that have no such form.
        """
        assert self._module is not None
        # Canonical weights may lie at any address; the kernels load them unaligned.
        tensors = (
            tvm_ffi.from_dlpack(_raw(array), require_alignment=array.itemsize)
            for array in (source, out)
        )
        try:
            self._module[symbol](*tensors, self._threads)
        except ValueError as error:
            raise TargetError(str(error), where=what, hint=PLAIN_INSTEAD) from None


def layout(packed: Mapping[str, Packed]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of a layer's weight file, in the order in which it is written."""
    return [(name, p.dtype, p.shape) for name, p in packed.items()]


def pack_layer(
    checkpoint: Checkpoint,
    plan: WeightPlan,
    packed: Mapping[str, Packed],
    packing: Packing,
    out: TensorFileWriter,
    allow_nonfinite: bool,
) -> None:
    """Write every parameter of a layer, holding one expert in memory at a time.

    Raises BadWeights for NaN and Inf (unless allowed), BadCheckpoint when a file changed,
    TargetError for weights that the target's form does not hold.
    """
    for name, one in packed.items():
        if not one.per_expert:
            source = plan.tensor(checkpoint, one.source, allow_nonfinite=allow_nonfinite)
            out.write(name, _packed(packing, one, source, one.shape, name))
            continue
        slot: Array | None = None
        for expert in range(one.shape[0]):
            source = plan.expert(checkpoint, one.source, expert, allow_nonfinite=allow_nonfinite)
            what = f"{name} of expert {expert}"
            slot = _packed(packing, one, source, one.shape[1:], what, slot)
            out.write(name, slot)


def _packed(
    packing: Packing,
    one: Packed,
    source: Array,
    shape: tuple[int, ...],
    what: str,
    slot: Array | None = None,
) -> Array:
    if one.symbol is None:
        return source
    out = aligned(shape, one.dtype) if slot is None else slot
    packing.run(one.symbol, source, out, what)
    return out


def _raw(array: Array) -> Array:
    """bfloat16 as its bits: NumPy's DLPack does not know the dtype."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array
