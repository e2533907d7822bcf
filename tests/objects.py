"""Compile each function once for all families: the same sizes give the same kernels.

A family's library is linked from the objects of its functions. What is compiled, and by whom,
is what the compiler does; only equal functions are not compiled a second time.
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tvm_ffi

from moec.compiler import pack
from moec.schedules import calls
from moec.schedules.cpu import BACKEND
from moec.schedules.cpu.codegen import compile_module
from moec.schedules.linking import find_linker
from moec.target import Target


class Objects:
    """Object files by the function that they were compiled from, for one target."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[tuple[Any, ...], Path] = {}
        self._modules: dict[tuple[Any, ...], Any] = {}

    def build(self, functions: Mapping[str, Any], target: Target, path: Path) -> None:
        """What a backend's `build` does."""
        files = [self._object(symbol, f, target) for symbol, f in functions.items()]
        linker = find_linker(target)
        # An entry calls kernels by their plain names, which exist within one object only; the
        # second call of a kernel is to "name.1".
        called = {name for file in files for name in _undefined(file)}
        names = [
            f"-Wl,--defsym={name}=__tvm_ffi_{name.partition('.')[0]}"
            for name in sorted(called)
            if name.partition(".")[0] in functions
        ]
        files.append(self._calls(linker))
        subprocess.run([linker, "-shared", "-s", "-o", path, *names, *files], check=True)

    def _calls(self, linker: str) -> Path:
        """The object file of how a library is called."""
        file = self.folder / f"{linker}.o"
        if not file.exists():
            source = file.with_suffix(".c")
            source.write_text(calls.SOURCE)
            options = "-c", "-O2", "-fPIC", "-fvisibility=hidden"
            subprocess.run([linker, *options, "-o", file, source], check=True)
        return file

    def module(self, functions: Mapping[str, Any], target: Target) -> Any:
        """What codegen.compile_module does."""
        key = tuple(self._key(s, f, target) for s, f in functions.items())
        if key not in self._modules:
            self._modules[key] = compile_module(functions, target)
        return self._modules[key]

    def _key(self, symbol: str, function: Any, target: Target) -> tuple[Any, ...]:
        return target.name, symbol, tvm_ffi.StructuralKey(function)

    def _object(self, symbol: str, function: Any, target: Target) -> Path:
        key = self._key(symbol, function, target)
        if key not in self._files:
            file = self.folder / f"{len(self._files)}.o"
            compile_module({symbol: function}, target).write_to_file(str(file))
            self._files[key] = file
        return self._files[key]


@functools.cache
def _undefined(file: Path) -> tuple[str, ...]:
    listed = subprocess.run(["nm", "-u", file], check=True, capture_output=True, text=True)
    return tuple(line.split()[-1] for line in listed.stdout.splitlines())


def install(objects: Objects, patch: pytest.MonkeyPatch) -> None:
    """Let moec.compile take its code from `objects`."""
    cached = dataclasses.replace(BACKEND, build=objects.build)
    patch.setattr(sys.modules["moec.compiler.compile"], "backend", lambda kind: cached)
    patch.setattr(pack, "compile_module", objects.module)
