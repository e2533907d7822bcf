"""Gives every layer its packed parameters: from the artifact, or packed from the checkpoint.

Mode "pack" maps the layer's weight file read-only or, with Memory.COPY, reads it into memory of
this process when the layer is first used. Mode "reference" packs from the checkpoint, also when
a layer is first used. All of it is lazy and done once, whichever thread comes first.

Why mapping is the default, on an OLMoE layer of 0.8 GB (Linux 6.18, ext4, 2 cores):

    |              | load, cached | load + first call, not cached | decoding at T = 1 |
    | map          | 10 ms        | 0.13 s                        | 24 to 28 GB/s     |
    | MAP_POPULATE | 10 ms        | 0.40 s                        | 25 to 28 GB/s     |
    | copy         | 180 ms       | 0.7 to 1.7 s                  | 25 to 29 GB/s     |

Mapped pages are huge ones there, and shared by all processes. Where they are of 4 KB (other
kernels and filesystems), decoding reads a fifth less, and a copy is for whoever minds.
"""

from __future__ import annotations

import enum
import io
import os
import threading
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np

from .. import host
from ..artifact import (
    ALIGNMENT,
    Artifact,
    Block,
    Entry,
    Packed,
    TargetShape,
    aligned,
    anonymous,
    mapped,
    read_entries,
)
from ..checkpoint import Checkpoint
from ..errors import ArtifactError, CheckFailed, ResourceError, UsageError
from ..weights import WeightPlan
from .libraries import Library
from .packing import Array, Packer

Parameters = Mapping[str, Array]
_HUGE = 4 << 20  # bytes from which a parameter gets memory of its own, which huge pages can back


class Memory(str, enum.Enum):
    """Where the weights that an artifact holds are while a model is in use."""

    MAP = "map"  # in the page cache: nothing to load, shared by all processes
    COPY = "copy"  # in the process's own memory, on huge pages wherever the system has them


class Binding:
    """The parameters of an artifact's layers for one target."""

    def __init__(
        self,
        artifact: Artifact,
        target: str,
        library: Library,
        checkpoint: str | os.PathLike[str] | None,
        workers: int,
        memory: Memory = Memory.MAP,
    ) -> None:
        self._artifact = artifact
        self._memory = memory
        self._shapes = artifact.manifest.targets[target].shapes
        self._bound: dict[int, Parameters] = {}
        self._lock = threading.Lock()
        weights = artifact.manifest.weights
        self._mapped = weights.mode == "pack" and weights.target == target
        if self._mapped:
            for block in artifact.manifest.blocks:  # cheap, and a damaged file shows at once
                if memory is Memory.MAP:
                    self.parameters(block)
                else:
                    self._entries(block, self._shapes[block.shape])
            return
        if checkpoint is None or any(block.plan is None for block in artifact.manifest.blocks):
            raise _needs_checkpoint(artifact, target)
        self._checkpoint = Checkpoint.open(os.fspath(checkpoint))
        _check_source(artifact, self._checkpoint)
        self._packer = Packer(library, self._checkpoint, workers)

    def parameters(self, block: Block) -> Parameters:
        """Packed parameters of a layer by name, in the dtypes of the manifest (bfloat16: its bits).

        Raises ArtifactError when a weight file does not hold what the manifest says, and for
        mode "reference" what reading the checkpoint raises; ResourceError without memory.
        """
        if block.layer not in self._bound:  # so that a layer in use never waits for another
            with self._lock:
                if block.layer not in self._bound:
                    shape = self._shapes[block.shape]
                    self._bound[block.layer] = self._bind(block, shape)
        return self._bound[block.layer]

    def dtypes(self, block: Block) -> Mapping[str, str]:
        """The dtypes of a layer's packed parameters by name, as the manifest has them."""
        return {name: p.dtype for name, p in self._shapes[block.shape].packed.items()}

    def _bind(self, block: Block, shape: TargetShape) -> Parameters:
        if not self._mapped:
            return self._pack(block, shape)
        return self._copy(block, shape) if self._memory is Memory.COPY else self._map(block, shape)

    def forget(self, block: Block) -> None:
        """Let go of a layer's parameters, once they were copied elsewhere."""
        with self._lock:
            self._bound.pop(block.layer, None)

    def _entries(self, block: Block, shape: TargetShape) -> tuple[Path, dict[str, Entry]]:
        """A layer's weight file and where its parameters lie in it."""
        path = self._artifact.file(str(block.weights))
        entries = read_entries(path)
        wanted = {name: (p.dtype, p.shape) for name, p in shape.packed.items()}
        if {name: (e.dtype, e.shape) for name, e in entries.items()} != wanted:
            raise ArtifactError(
                "a weight file does not hold the parameters that the manifest lists",
                where=str(path),
                need=", ".join(f"{n} {list(s)} {d}" for n, (d, s) in sorted(wanted.items())),
                hint="compile the artifact again",
            )
        return path, entries

    def _map(self, block: Block, shape: TargetShape) -> Parameters:
        path, entries = self._entries(block, shape)
        memory = mapped(path)
        return {
            name: memory[e.offset : e.offset + e.bytes].view(_raw(e.dtype)).reshape(e.shape)
            for name, e in entries.items()
        }

    def _copy(self, block: Block, shape: TargetShape) -> Parameters:
        path, entries = self._entries(block, shape)
        _check_memory("copying", {name: _bytes(p) for name, p in shape.packed.items()}, block)
        bound = {}
        with open(path, "rb", buffering=0) as file:
            for name, entry in entries.items():
                out = bound[name] = _allocate(shape.packed[name])
                file.seek(entry.offset)
                _read_whole(file, out, path)
        return bound

    def _pack(self, block: Block, shape: TargetShape) -> Parameters:
        _check_memory("packing", {name: _bytes(p) for name, p in shape.packed.items()}, block)
        plan = WeightPlan.from_json(dict(block.plan or {}))
        plan.check(self._checkpoint)
        bound = {}
        for name, packed in shape.packed.items():
            out = bound[name] = _allocate(packed)
            if not packed.per_expert:
                self._packer.fill(packed, plan, None, out)
            for expert in range(packed.shape[0] if packed.per_expert else 0):
                self._fill_expert(packed, plan, expert, out[expert])
        self._checkpoint.release()
        return bound

    def _fill_expert(self, packed: Packed, plan: WeightPlan, expert: int, out: Array) -> None:
        if out.nbytes % ALIGNMENT == 0:
            self._packer.fill(packed, plan, expert, out)
            return
        whole = aligned(out.shape, out.dtype.name)  # the next expert starts off the alignment
        self._packer.fill(packed, plan, expert, whole)
        np.copyto(out, whole)


def _raw(dtype: str) -> np.dtype[np.generic]:
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def _bytes(packed: Packed) -> int:
    return prod(packed.shape) * _raw(packed.dtype).itemsize


def _allocate(packed: Packed) -> Array:
    """Memory for a parameter, on huge pages if it is large."""
    size = _bytes(packed)
    if size < _HUGE:
        return aligned(packed.shape, _raw(packed.dtype).name)
    try:
        return anonymous(packed.shape, _raw(packed.dtype).name)
    except (OSError, ValueError, MemoryError) as error:
        raise ResourceError(f"{size / 1e9:.2f} GB cannot be allocated: {error}") from None


def _read_whole(file: io.FileIO, out: Array, path: Path) -> None:
    """Fill `out` from where the file stands."""
    left = out.reshape(-1).view(np.uint8).data
    while left:
        count = file.readinto(left)
        if not count:
            raise ArtifactError(
                f"weight file {path.name} has become shorter",
                where=str(path),
                need="files that nobody changes while they are in use",
            )
        left = left[count:]


def _check_memory(what: str, sizes: dict[str, int], block: Block) -> None:
    needed, free = sum(sizes.values()), host.memory()[1]
    if free and needed > free:
        raise ResourceError(
            f"{what} layer {block.layer} needs {needed / 1e9:.2f} GB of memory, "
            f"{free / 1e9:.2f} GB are free",
            hint="free memory, or compile with weights='pack', which is mapped, not loaded"
            if what == "packing"
            else "free memory, or load with memory='map'",
        )


def _needs_checkpoint(artifact: Artifact, target: str) -> UsageError:
    weights = artifact.manifest.weights
    if weights.mode == "pack" and any(block.plan is None for block in artifact.manifest.blocks):
        return UsageError(
            f"the artifact holds weights packed for {weights.target}, not for {target}",
            where=str(artifact.path),
            hint=f"compile the checkpoint again for {target}",
        )
    if weights.mode == "reference":
        message = "the artifact holds no weights, they stay in the checkpoint"
    else:
        message = f"the artifact holds weights packed for {weights.target}, not for {target}"
    return UsageError(
        message,
        where=str(artifact.path),
        need="the checkpoint that it was compiled from",
        hint="moec.load(path, checkpoint=CHECKPOINT), or --checkpoint on the command line",
    )


def _check_source(artifact: Artifact, checkpoint: Checkpoint) -> None:
    for key, value in checkpoint.digest().items():
        if artifact.manifest.source.get(key) != value:
            part = "config.json" if key.startswith("config") else "the tensors"
            raise CheckFailed(
                f"the checkpoint is not the one that the artifact was compiled from: {part} differ",
                where=str(checkpoint.path),
                need=f"{key} {artifact.manifest.source.get(key)}, this one has {value}",
                hint="give the original checkpoint, or compile this one",
            )
