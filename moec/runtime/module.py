"""Loads an artifact and runs its blocks: the public face of the runtime.

    model = moec.load("model.moec")
    y = model[3](x)                              # layer 3: route, experts, shared experts
    ids, weights = model[3].route(x)
    y = model[3].experts(x, ids, weights)        # with a router of your own

Tensors are NumPy, torch or DLPack, [T, H] in the model's dtype; results are of the kind of
x. Every method is safe to call from several threads. After os.fork() a child may go on
using a model; there, the thread that forked works alone.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import host
from ..artifact import Artifact, Target, Verify
from ..artifact import Block as BlockEntry
from ..errors import InputError, MoecError, TargetError, UsageError
from ..spec import MoESpec
from . import cuda
from .binding import Binding, Memory
from .call import Call
from .devices import RUNNABLE, MakeCall, gpu_number, make_calls, open_device
from .libraries import open_library
from .tensors import view


def load(
    path: str | os.PathLike[str],
    device: str = "cpu",
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    verify: Verify | str = Verify.FULL,
    memory: Memory | str = Memory.MAP,
) -> Model:
    """Load the artifact at `path` for `device` ("cpu", "cuda:0", "metal:0").

    `checkpoint` is needed when the weights were left there (weights="reference"). `threads` is
    how many parts a call is split into, by default what TVM_NUM_THREADS says, else the cores that
    this process may use; it never changes a result. `verify` "full" hashes every file first;
    "library" skips the contents of weight files, which makes opening large artifacts fast.
    `memory` "map" leaves the weights that the artifact holds in the page cache, which costs no
    time to load and is shared by processes; "copy" reads a layer into huge pages of this process
    when it is first used, which decodes faster where the page cache has none (binding.py has the
    figures).

    Raises ArtifactError (damaged, or made by versions that do not fit), TargetError (nothing
    in it runs here), UsageError (no artifact, missing checkpoint, senseless argument).
    """
    parts, place = _threads(threads), _memory(memory)
    if verify == Verify.MANIFEST:
        raise UsageError(
            "a library is never loaded unhashed",
            where="verify",
            need="full or library",
        )
    artifact = Artifact.open(path, verify)
    name = _choose_target(artifact, device)
    workers = min(parts, host.cores())
    metal = open_device(device)
    try:
        library = open_library(artifact.file(artifact.manifest.targets[name].library))
    except MoecError as error:
        if type(error) is not MoecError:
            raise
        raise TargetError(
            "the library cannot be loaded", where=error.message, hint="compile the artifact again"
        ) from None
    binding = Binding(artifact, name, library, checkpoint, workers, place)
    call = make_calls(device, metal, library, binding, (parts, workers))
    return Model(artifact, name, call, parts)


class Model:
    """The blocks of a loaded artifact, by layer number: `model[3]`, `for layer in model`."""

    def __init__(
        self,
        artifact: Artifact,
        target: str,
        call: MakeCall,
        threads: int,
    ) -> None:
        self.path: Path = artifact.path
        self.target = target
        self.digest = artifact.manifest.digest
        self.threads = threads
        self._blocks = {
            entry.layer: Block(artifact, target, entry, call) for entry in artifact.manifest.blocks
        }

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers that the artifact holds, ascending."""
        return tuple(self._blocks)

    def __getitem__(self, layer: int) -> Block:
        """The block of a layer; InputError if the artifact does not hold it."""
        block = self._blocks.get(layer) if isinstance(layer, Hashable) else None
        if block is None:
            held = ", ".join(map(str, self._blocks))
            raise InputError(
                f"layer {layer!r} is not in the artifact",
                where=str(self.path),
                need=f"one of the layers {held}",
                hint="'moec inspect' shows which layers an artifact holds",
            )
        return block

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, layer: object) -> bool:
        return layer in self._blocks

    def __repr__(self) -> str:
        return f"<moec.Model {self.path.name} {self.target} layers {list(self._blocks)}>"


class Block:
    """One MoE block. x is [T, H] in `spec.dtype`; T may be 0."""

    def __init__(
        self,
        artifact: Artifact,
        target: str,
        entry: BlockEntry,
        call: MakeCall,
    ) -> None:
        self.layer = entry.layer
        self.spec: MoESpec = artifact.manifest.shapes[entry.shape].spec
        self._where = str(artifact.path)
        compiled = artifact.manifest.targets[target].shapes[entry.shape]
        self._calls = {
            name: call(entry, name, function, self.spec.experts)
            for name, function in compiled.functions.items()
        }
        self._moe, self._experts = self._calls.get("moe"), self._calls.get("experts")

    def __call__(
        self,
        x: Any,
        out: Any = None,
        schedule: str | None = None,
        *,
        token_ids: Any = None,
        shared_x: Any = None,
    ) -> Any:
        """y [T, H] of the whole block: route, experts, shared experts, norms.

        `out` is an optional tensor [T, H] for the result, `schedule` forces a compiled
        schedule by name. Few blocks have further inputs: `token_ids` [T] int32 of the input
        tokens, where they choose the experts, and `shared_x` [T, H], where the shared expert
        reads something else than x. Raises InputError for a tensor that does not fit, and for
        one that the block needs or does not know.
        """
        call = self._moe or self._function("moe")
        if token_ids is None and shared_x is None and len(call.inputs) == 1:
            return call((x,), out, schedule)[0]
        inputs = self._inputs("moe", x, token_ids=token_ids, shared_x=shared_x)
        return call(inputs, out, schedule)[0]

    def route(
        self, x: Any, schedule: str | None = None, *, token_ids: Any = None
    ) -> tuple[Any, Any]:
        """(topk_ids int32 [T, K], topk_weights float32 [T, K]) of the router for x [T, H].

        `token_ids` [T] int32 is needed where they choose the experts, as for the whole block.
        """
        inputs = self._inputs("route", x, token_ids=token_ids)
        ids, weights = self._function("route")(inputs, None, schedule)
        return ids, weights

    def experts(
        self,
        x: Any,
        topk_ids: Any,
        topk_weights: Any,
        out: Any = None,
        schedule: str | None = None,
        *,
        check_ids: bool = False,
    ) -> Any:
        """y [T, H]: the sum over k of topk_weights[t, k] * expert topk_ids[t, k] (x[t]).

        topk_ids is int32 [T, K] (int64 is converted, a copy of [T, K]), topk_weights float32
        [T, K]. An id outside [0, E) contributes 0, so that ids of experts held elsewhere can
        be -1; `check_ids=True` makes it an InputError instead. Repeated ids add up.
        """
        if check_ids:
            self._check_ids(topk_ids)
        call = self._experts or self._function("experts")
        return call((x, topk_ids, topk_weights), out, schedule)[0]

    def schedules(self, function: str = "moe") -> tuple[str, ...]:
        """The schedules that "moe", "route" or "experts" was compiled with."""
        return self._function(function).schedules

    def _inputs(self, function: str, x: Any, **more: Any) -> tuple[Any, ...]:
        needed = self._function(function).inputs
        for name, tensor in more.items():
            if (tensor is not None) != (name in needed):
                problem = "needs" if tensor is None else "has no input"
                raise InputError(
                    f"{function} of layer {self.layer} {problem} {name}",
                    where=name,
                    need=f"{', '.join(needed)}",
                )
        return tuple({"x": x, **more}[name] for name in needed)

    def _function(self, name: str) -> Call:
        call = self._calls.get(name)
        if call is None:
            raise TargetError(
                f"the artifact has no function {name!r} for layer {self.layer}",
                where=self._where,
                need=f"one of {', '.join(self._calls)}",
            )
        return call

    def _check_ids(self, topk_ids: Any) -> None:
        got = view(topk_ids, "topk_ids")
        array = topk_ids if isinstance(topk_ids, np.ndarray) else np.from_dlpack(topk_ids)
        experts = self.spec.experts.num_experts + self.spec.experts.zero_experts
        if got.dtype in ("int32", "int64") and array.size:
            for bad in (int(array.min()), int(array.max())):
                if not 0 <= bad < experts:
                    raise InputError(
                        f"topk_ids holds {bad}",
                        where="topk_ids",
                        need=f"ids in [0, {experts})",
                        hint="without check_ids, such an id contributes 0",
                    )

    def __repr__(self) -> str:
        e = self.spec.experts
        sizes = f"E={e.num_experts} K={e.top_k} H={e.hidden_size} I={e.intermediate_size}"
        return f"<moec.Block layer {self.layer} {sizes} {self.spec.dtype}>"


def _threads(threads: int | None) -> int:
    if threads is None:
        return host.threads()
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise UsageError(f"threads={threads!r} is not an integer", where="threads")
    if not 1 <= threads <= host.MOST_THREADS:
        raise UsageError(
            f"threads={threads} makes no sense", where="threads", need=f"1 to {host.MOST_THREADS}"
        )
    return threads


def _memory(name: Memory | str) -> Memory:
    try:
        return Memory(name)
    except ValueError:
        known = ", ".join(m.value for m in Memory)
        raise UsageError(f"memory={name!r} is unknown", where="memory", need=known) from None


def _choose_target(artifact: Artifact, device: str) -> str:
    """The compiled target for `device` that asks most of this machine and gets it."""
    kind, _, index = device.partition(":") if isinstance(device, str) else ("", "", "")
    if not kind or (index and not index.isdigit()):
        raise UsageError(f"device={device!r} is no device", where="device", need="as cpu, cuda:0")
    targets = artifact.manifest.targets
    held = ", ".join(f"{name} (device {t.device})" for name, t in targets.items()) or "none"
    fitting = {name: t for name, t in targets.items() if t.device == kind}
    if not fitting or kind not in RUNNABLE:
        raise TargetError(
            f"the artifact cannot run on device {device}",
            where=str(artifact.path),
            need=f"one of its targets: {held}; this runtime runs {', '.join(RUNNABLE)}",
            hint="load it on a device that it was compiled for, or compile it for this one",
        )
    reasons = {name: _missing(target, device) for name, target in fitting.items()}
    usable = [name for name, reason in reasons.items() if reason is None]
    if not usable:
        raise TargetError(
            "this machine cannot run the artifact",
            where=str(artifact.path),
            need="; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
            hint="compile it on this machine, or for a lower target such as cpu:x86-64-v3"
            if gpu_number(device) is None
            else "compile it for this GPU, or for cuda:compute_80, which every later GPU runs",
        )
    return max(usable, key=lambda name: _preference(name, fitting[name], artifact))


def _missing(target: Target, device: str) -> str | None:
    reason, gpu = host.missing(target.requires), gpu_number(device)
    if reason is None and gpu is not None:
        return cuda.missing(str(target.requires.get("gpu")), gpu)
    return reason


def _preference(name: str, target: Target, artifact: Artifact) -> tuple[bool, int, str]:
    packed = artifact.manifest.weights.target == name
    return packed, len(target.requires.get("features", ())), name
