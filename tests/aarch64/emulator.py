"""Runs an artifact's functions for aarch64 in QEMU's user mode: no Arm machine, no TVM there.

The calls are those of moec.runtime.call, written to a file for run.c.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moec.artifact import Artifact, Variant, Verify, read_entries
from moec.runtime.abi import TYPES
from tests.blocks import DTYPES

QEMU = ("qemu-aarch64", "qemu-aarch64-static")
CC = "aarch64-linux-gnu-gcc"
_ROOT = "/usr/aarch64-linux-gnu"
_INT, _TENSOR = 1, 7
THREADS = 2

Array = np.ndarray[Any, Any]


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    if not any(map(shutil.which, QEMU)):
        return f"{QEMU[0]} is not installed (Debian package qemu-user)"
    if shutil.which(CC) is None:
        return f"{CC} is not installed (Debian package gcc-aarch64-linux-gnu)"
    return None


class Emulator:
    """Runs artifacts on an emulated CPU."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.program = folder, folder / "run"
        source = Path(__file__).with_name("run.c")
        command = [CC, "-O1", "-Wall", "-Werror", "-rdynamic", "-o", self.program, source, "-ldl"]
        subprocess.run(command, check=True)
        self.qemu = next(path for path in map(shutil.which, QEMU) if path)

    def call(
        self, artifact: Path, cpu: str, calls: Sequence[tuple[int, str, str, Sequence[Array]]]
    ) -> list[list[Array]]:
        """Outputs of (layer, function, schedule, inputs) for each of the calls."""
        job = _Job(artifact)
        outputs = [job.add(*one) for one in calls]
        path, out = self.folder / "job", self.folder / "out"
        path.write_bytes(job.bytes())
        command = [self.qemu, "-cpu", cpu, "-L", _ROOT, self.program, job.library, path, out]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
        memory, at = out.read_bytes(), 0
        for number, array in enumerate(job.buffers):
            raw = np.frombuffer(memory, np.uint8, array.nbytes, at)
            job.buffers[number] = raw.view(array.dtype).reshape(array.shape)
            at += array.nbytes
        return [[job.buffers[n] for n in numbers] for numbers in outputs]


class _Job:
    def __init__(self, path: Path) -> None:
        self.artifact = Artifact.open(path, Verify.LIBRARY)
        (target,) = self.artifact.manifest.targets.values()
        self.target, self.library = target, self.artifact.file(target.library)
        self.buffers: list[Array] = []
        self.calls: list[bytes] = []
        self.weights: dict[tuple[int, str], int] = {}

    def add(self, layer: int, name: str, schedule: str, inputs: Sequence[Array]) -> list[int]:
        """The numbers of the buffers that the call will write its outputs to."""
        block = next(b for b in self.artifact.manifest.blocks if b.layer == layer)
        function = self.target.shapes[block.shape].functions[name]
        variant = next(v for v in function.variants if v.schedule == schedule)
        tokens = len(inputs[0])
        args = [self._tensor(self._buffer(array)) for array in inputs]
        args += [self._tensor(self._weight(block, p)) for p in function.parameters]
        outputs = []
        for port in function.outputs:
            shape = (tokens, *(int(d) for d in port.shape[1:]))
            outputs.append(self._buffer(np.zeros(shape, DTYPES.get(port.dtype, np.int32))))
        args += map(self._tensor, outputs)
        args.append(self._tensor(self._buffer(_workspace(variant, tokens))))
        args.append(struct.pack("<qq", _INT, THREADS))
        symbol = f"__tvm_ffi_{variant.symbol}".encode()
        head = struct.pack("<q", len(symbol)) + symbol + struct.pack("<q", len(args))
        self.calls.append(head + b"".join(args))
        return outputs

    def bytes(self) -> bytes:
        parts = [struct.pack("<q", len(self.buffers))]
        for array in self.buffers:
            parts += [struct.pack("<q", array.nbytes), np.ascontiguousarray(array).tobytes()]
        return b"".join([*parts, struct.pack("<q", len(self.calls)), *self.calls])

    def _buffer(self, array: Array) -> int:
        self.buffers.append(array)
        return len(self.buffers) - 1

    def _weight(self, block: Any, name: str) -> int:
        key = (block.layer, name)
        if key not in self.weights:
            path = self.artifact.file(str(block.weights))
            entry = read_entries(path)[name]
            raw = np.fromfile(path, np.uint8, entry.bytes, offset=entry.offset)
            kind = "uint16" if entry.dtype == "bfloat16" else entry.dtype
            self.weights[key] = self._buffer(raw.view(kind).reshape(entry.shape))
        return self.weights[key]

    def _tensor(self, number: int) -> bytes:
        array = self.buffers[number]
        code, bits = TYPES[array.dtype.name]
        fields = (_TENSOR, number, code, bits, array.ndim, *array.shape)
        return struct.pack(f"<{len(fields)}q", *fields)


def _workspace(variant: Variant, tokens: int) -> Array:
    fixed, per_token = variant.workspace
    # Not zeros: nothing may rely on what is in there.
    return np.full(fixed + per_token * tokens, 0xA5, np.uint8)
