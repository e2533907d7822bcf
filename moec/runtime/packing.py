"""Canonical weights into the layout of the compiled functions, one expert at a time.

The work is done by the library's own pack symbols; the most memory that is held besides
the destination is one expert in its canonical form.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..artifact import Packed
from ..checkpoint import Checkpoint
from ..errors import ArtifactError, MoecError, TargetError
from ..weights import WeightPlan
from . import abi
from .libraries import Library, runtime
from .pool import use_workers
from .tensors import address

Array = np.ndarray[Any, np.dtype[Any]]


class Packer:
    """Packs parameters of one checkpoint through one library."""

    def __init__(self, library: Library, checkpoint: Checkpoint, workers: int) -> None:
        self._library = library
        self._checkpoint = checkpoint
        self._workers = workers

    def fill(self, packed: Packed, plan: WeightPlan, expert: int | None, out: Array) -> None:
        """Write the packed form of `expert` (None: of the whole parameter) to `out`.

        `out` has the shape of one packed expert, or of the whole, in the packed dtype, and
        is C-contiguous and 64-byte aligned. Raises what the weight plan raises, and TargetError
        for weights that the target's form does not hold.
        """
        if expert is None:
            source = plan.tensor(self._checkpoint, packed.source)
        else:
            source = plan.expert(self._checkpoint, packed.source, expert)
        raw = np.ascontiguousarray(source)
        raw = raw.view(np.uint16) if raw.dtype.name == "bfloat16" else raw
        if packed.symbol is None:
            if (raw.dtype, raw.shape) != (out.dtype, out.shape):
                raise _mismatch(packed, raw, out)
            np.copyto(out, raw)
            return
        use_workers(self._workers)
        shapes = abi.dims(raw.shape), abi.dims(out.shape)
        tensors = [
            abi.tensor(shape, array.dtype.name, address(array))
            for shape, array in zip(shapes, (raw, out), strict=True)
        ]
        function = self._library.function(packed.symbol)
        frame = abi.Frame(runtime(), function, tensors, [self._workers], (shapes, raw, out))
        try:
            frame.call()
        except MoecError as error:
            kind, _, said = (error.where or "").partition(": ")
            if kind != "ValueError":  # a fault of ours, and no weights that have no such form
                raise
            raise TargetError(
                said.strip(),
                where=packed.source if expert is None else f"{packed.source} of expert {expert}",
                hint="compile for a target that has weights as they are, such as cuda:sm_90a",
            ) from None


def _mismatch(packed: Packed, raw: Array, out: Array) -> ArtifactError:
    return ArtifactError(
        f"parameter {packed.source!r} is copied as it is, but differs in form",
        need=f"{list(out.shape)} {out.dtype.name}, the checkpoint gives "
        f"{list(raw.shape)} {raw.dtype.name}",
        hint="compile the artifact again",
    )
