"""MSL text into a shared library for this machine, and launches of its kernels.

The text is compiled as C++17 against `include/metal_stdlib`. Three things are rewritten:
pointers to device and threadgroup memory become checked pointer types, arrays in threadgroup
memory become views of the threadgroup's arena, and the kernel gets a fixed name, so that
kernels that differ only in their name are compiled once.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
_HEADERS = sorted((HERE / "include").iterdir())
_KERNEL = re.compile(r"\bkernel\s+void\s+(\w+)\s*\(")
_TYPE = r"((?:typename\s+)?[\w:]+(?:<[\w:, ]*>)?)"
_POINTER = re.compile(
    rf"\b(const\s+)?(device|threadgroup)\s+(const\s+)?(?:volatile\s+)?{_TYPE}(\s+const)?\s*\*"
)
_ARRAY = re.compile(r"^([ \t]*)threadgroup\s+(\w+)\s+(\w+)\[(\d+)\];", re.M)


class MSLError(RuntimeError):
    """A kernel did not compile, or broke a rule while it ran."""


@dataclass(frozen=True)
class Order:
    """In which order threads and threadgroups run: "forward", "reverse" or "random" by seed."""

    kind: str = "forward"
    seed: int = 0

    @property
    def number(self) -> int:
        """The kind as the native code knows it."""
        return ("forward", "reverse", "random").index(self.kind)


# A kernel that is right gives the same bits in all of these.
ORDERS = (Order(), Order("reverse"), Order("random", 1), Order("random", 2))


def kernels(source: str) -> list[str]:
    """The names of the kernels in MSL text."""
    return _KERNEL.findall(source)


def translate(source: str) -> str:
    """MSL text with one kernel as C++ in which the kernel is called msl_kernel."""
    names = kernels(source)
    if len(names) != 1:
        raise MSLError(f"the text holds {len(names)} kernels, not one")
    body = re.sub(rf"\b{names[0]}\b", "msl_kernel", source)
    body = re.sub(rf"\b{names[0]}_args_t\b", "msl_kernel_args_t", body)
    body = re.sub(r"^// Function: .*$", "", body, flags=re.M)
    body = _ARRAY.sub(r"\1MSL_THREADGROUP(\2, \3, \4);", body)
    return _POINTER.sub(_pointer, body)


def _pointer(match: re.Match[str]) -> str:
    before, space, middle, kind, after = match.groups()
    const = "const " if before or middle or after else ""
    return f"msl::{space}_ptr<{const}{kind}>"


@dataclass(frozen=True)
class Built:
    """A kernel of a shared library."""

    library: Path
    entry: str


def compile_msl(source: str) -> Built:
    """The kernel of MSL text, compiled; MSLError with the compiler's words."""
    return compile_together([source])[0]


def compile_together(sources: Sequence[str]) -> list[Built]:
    """The kernels of MSL texts with one kernel each; those not known yet become one library,
    which takes a third of the time of a library each."""
    texts = [translate(source) for source in sources]
    marks = [_cache() / f"{_key(text)}.kernel" for text in texts]
    missing = {m: t for m, t in zip(marks, texts, strict=True) if not m.exists()}
    if missing:
        _build(missing)
    return [Built(_cache() / name, entry) for name, entry in (m.read_text().split() for m in marks)]


def _key(text: str) -> str:
    key = hashlib.sha256(text.encode())
    for part in (" ".join(_command()), str(_core()), *(h.read_text() for h in _HEADERS)):
        key.update(part.encode())
    return key.hexdigest()[:32]


def _command() -> list[str]:
    return [*_compiler(), *_flags()]


def _build(texts: dict[Path, str]) -> None:
    """Compile one library of all `texts`, and leave the mark of each: library and entry."""
    parts, entries = ["#include <metal_stdlib>\n"], ["#include <msl_launch.h>\n"]
    for number, text in enumerate(texts.values()):
        parts.append(f"namespace k{number} {{\n#line 1\n{text}\n}}\n")
        entries.append(f"MSL_ENTRY(msl_entry_{number}, k{number}::msl_kernel)\n")
    names = "".join(sorted(mark.name for mark in texts))
    own = f"{os.getpid()}-{threading.get_ident()}"
    library = _cache() / f"{hashlib.sha256(names.encode()).hexdigest()[:32]}.so"
    unit, made = library.with_suffix(f".{own}.cc"), library.with_suffix(f".{own}.so")
    unit.write_text("".join([*parts, *entries]))
    command, core = _command(), _core()
    result = subprocess.run(
        [*command, "-include", str(_precompiled(command)), str(unit), str(core), "-o", str(made)],
        capture_output=True,
        text=True,
        check=False,
    )
    unit.unlink()
    if result.returncode:
        raise MSLError(f"the C++ compiler rejects the MSL:\n{result.stderr[:4000]}")
    made.rename(library)
    for number, mark in enumerate(texts):
        fresh = mark.with_suffix(f".{own}")
        fresh.write_text(f"{library.name} msl_entry_{number}")
        fresh.rename(mark)


def _compiler() -> list[str]:
    for name in (os.environ.get("CXX"), "c++", "g++"):
        if name and shutil.which(name):
            return [name]
    raise MSLError("no C++ compiler was found (c++ or g++)")


def _flags() -> list[str]:
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-fno-strict-aliasing"]
    flags += ["-fno-exceptions", "-ffp-contract=off", f"-I{HERE / 'include'}"]
    return [*flags, *_extensions()]


@cache
def _extensions() -> list[str]:
    known = platform.machine() == "x86_64" and "f16c" in Path("/proc/cpuinfo").read_text()
    return ["-mf16c", "-mavx"] if known else []


def _cache() -> Path:
    folder = os.environ.get("METAL_EMULATOR_CACHE")
    path = Path(folder) if folder else Path(tempfile.gettempdir()) / "metal-emulator"
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While the block runs, no other process builds what all share."""
    with (_cache() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@cache
def _core() -> Path:
    """The library with the part that no kernel changes, built when its source changed."""
    files = [*sorted((HERE / "core").iterdir()), HERE / "include" / "msl_fiber.h"]
    command = [*_compiler(), "-std=c++17", "-O2", "-fPIC", "-shared", "-pthread"]
    command += [*_extensions(), "-ffp-contract=off", "-Wno-psabi"]
    command += [str(file) for file in files if file.suffix == ".cc"]
    key = hashlib.sha256(" ".join(command).encode())
    for file in files:
        key.update(file.read_bytes())
    library = _cache() / f"core-{key.hexdigest()[:24]}.so"
    with alone():
        if not library.exists():
            made = library.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, "-o", str(made)], check=True)
            made.rename(library)
    return library


def _precompiled(command: list[str]) -> Path:
    """A header of all that every kernel includes, compiled once: two thirds of the time."""
    key = hashlib.sha256(" ".join(command).encode())
    for header in _HEADERS:
        key.update(header.read_bytes())
    header = _cache() / f"{key.hexdigest()[:32]}.h"
    made = header.with_suffix(".h.gch")
    with alone():
        if made.exists():
            return header
        # Standard headers first: metal_stdlib defines words such as `thread` as macros.
        names = ("string", "utility", "vector", "metal_stdlib")
        header.write_text("".join(f"#include <{name}>\n" for name in names))
        fresh = made.with_suffix(f".{os.getpid()}")
        options = [flag for flag in command if flag != "-shared"]
        subprocess.run([*options, "-x", "c++-header", str(header), "-o", str(fresh)], check=True)
        fresh.rename(made)
    return header


class _Request(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("count", ctypes.c_uint64),
        ("scalars", ctypes.c_char_p),
        ("grid", ctypes.c_void_p),
        ("block", ctypes.c_void_p),
        ("config", ctypes.c_void_p),
        ("counters", ctypes.c_void_p),
        ("error", ctypes.c_char_p),
        ("error_size", ctypes.c_uint64),
    )


def run(
    source: str,
    args: Sequence[Any],
    grid: Sequence[int],
    block: Sequence[int],
    order: Order = ORDERS[0],
    trace: bool = True,
) -> None:
    """Launch the kernel of MSL text on NumPy arrays, which it may change.

    `args` are arrays (buffers, in the kernel's order) and NumPy scalars, which are packed 8
    bytes each as TVM's runtime does. `trace` also finds races between threadgroups. Raises
    MSLError when the kernel breaks a rule.
    """
    built = compile_msl(source)
    entry = getattr(ctypes.CDLL(str(built.library)), built.entry)
    arrays = [a for a in args if isinstance(a, np.ndarray)]
    scalars = [a for a in args if not isinstance(a, np.ndarray)]
    pointers = (ctypes.c_void_p * max(1, len(arrays)))(*[a.ctypes.data for a in arrays])
    sizes = (ctypes.c_uint64 * max(1, len(arrays)))(*[a.nbytes for a in arrays])
    packed = b"".join(np.asarray(s).tobytes().ljust(8, b"\0") for s in scalars) or bytes(8)
    extents = [(ctypes.c_uint * 3)(*[*shape, 1, 1][:3]) for shape in (grid, block)]
    config = (ctypes.c_int * 4)(order.number, order.seed, 1, int(trace))
    counters = (ctypes.c_uint64 * 16)()
    error = ctypes.create_string_buffer(2048)
    places = [ctypes.addressof(x) for x in (pointers, sizes, *extents, config, counters)]
    request = _Request(
        places[0], places[1], len(arrays), packed, *places[2:5], places[5],
        ctypes.cast(error, ctypes.c_char_p), 2048,
    )  # fmt: skip
    if entry(ctypes.byref(request)):
        raise MSLError(error.value.decode())
