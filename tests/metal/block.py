"""A block compiled from a spec alone, run on the emulated device through its entries."""

from __future__ import annotations

import json
import tempfile
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm.runtime import _ffi_api

from moec import target
from moec.compiler.instruments import Observer
from moec.compiler.lower import Lowered, lower
from moec.compiler.options import CompileOptions
from moec.schedules import backend, choose
from moec.schedules.metal import codegen
from moec.spec import MoESpec
from tools.metal_emulator import kernels

Array = np.ndarray[Any, Any]
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SCHEDULES = ("tiles32", "tiles64", "gather", "loop")
HEAD = "#include <metal_stdlib>"


def lowered(spec: MoESpec, schedules: tuple[str, ...] = SCHEDULES) -> Lowered:
    """The kernels and entries of a spec."""
    to, own = target.resolve("metal:emulated"), backend("metal")
    observer = Observer(CompileOptions())
    return lower("b0", spec, to, own, choose(own, schedules, spec, to), observer, None)


class Block:
    """Random canonical parameters and the compiled functions `parts` of a spec."""

    def __init__(
        self,
        spec: MoESpec,
        schedules: tuple[str, ...] = SCHEDULES,
        parts: tuple[str, ...] = ("experts",),
        seed: int = 0,
    ) -> None:
        self.spec, self.lowered = spec, lowered(spec, schedules)
        entries = [v.entry for f in parts for v in self.lowered.variants[f]]
        symbols = {s for entry in entries for s in (entry.symbol, *entry.kernels)}
        functions = {n: f for n, f in self.lowered.functions.items() if n in symbols}
        self._module = _built(functions)
        random = np.random.default_rng(seed)
        self.parameters = {
            name: (random.normal(size=p.shape) / p.shape[-1] ** 0.5).astype(NUMPY[p.dtype])
            for name, p in spec.parameters().items()
        }

    def texts(self) -> dict[str, str]:
        """Kernel name -> the MSL that the device compiles."""
        code = self._module.imports[0].inspect_source()
        texts = [f"{HEAD}{text}" for text in code.split(HEAD)[1:]]
        return {kernels(text)[0]: text for text in texts}

    def run(self, function: str, schedule: str, **inputs: Array) -> dict[str, Array]:
        """The outputs of "route", "experts" or "moe" by name."""
        variant = next(v for v in self.lowered.variants[function] if v.schedule.name == schedule)
        entry, metal = variant.entry, tvm.metal(0)
        tokens, e = len(inputs["x"]), self.spec.experts
        shapes = {
            "y": ((tokens, e.hidden_size), self.spec.dtype),
            "topk_ids": ((tokens, e.top_k), "int32"),
            "topk_weights": ((tokens, e.top_k), "float32"),
        }
        kinds = {**NUMPY, "int32": np.int32}
        outputs = {n: np.empty(shapes[n][0], kinds[shapes[n][1]]) for n in entry.outputs}
        arrays = [
            *(inputs[n] for n in entry.inputs),
            *(_raw(self.parameters[n]) for n in entry.parameters),
            *outputs.values(),
        ]
        tensors = [tvm.runtime.tensor(array, metal) for array in arrays]
        fixed, per_token = entry.workspace
        workspace = tvm.runtime.empty((fixed + per_token * tokens,), "uint8", metal)
        self._module[entry.symbol](*tensors, workspace, 1)
        made = tensors[len(tensors) - len(outputs) :]
        return {
            name: made[i].numpy().view(array.dtype)
            for i, (name, array) in enumerate(outputs.items())
        }


def _built(functions: dict[str, Any]) -> Any:
    """The functions as a loaded library whose host code is not optimised: it runs once, and
    compiling it as moec does, or by TVM's JIT compiler, takes five times as long."""
    ours = codegen.metal_target

    def quick(to: target.Target) -> Any:
        made = ours(to)
        host = {**made.host.export(), "opt-level": 0}
        return tvm.target.Target({**made.export(), "host": host})

    def pack(module: Any, system: bool, prefix: str, folder: str) -> str:
        # TVM takes code whose empty startup function was not optimised away for a system
        # library, which would register its symbols for the whole process.
        llvm = json.dumps({"kind": "llvm", "mtriple": to.triple})
        packed = _ffi_api.ModulePackImportsToLLVM(module, False, llvm, prefix)
        packed.write_to_file(f"{folder}/packed.o")
        return f"{folder}/packed.o"

    to = target.resolve("metal:emulated")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(codegen, "metal_target", quick)
        module, path = codegen.compile_module(functions, to), f"{folder}/block.so"
        module.export_library(path, cc="cc", fpack_imports=pack)
        return tvm.runtime.load_module(path)


def _raw(array: Array) -> Array:
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def error(got: Array, want: Array) -> float:
    """|got - want| / |want|; NaN never passes a comparison."""
    difference = np.linalg.norm(got.astype(np.float64) - want.astype(np.float64))
    return float(difference / np.linalg.norm(want.astype(np.float64)))
