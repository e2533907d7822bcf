"""Finds and loads the native libraries: libtvm_ffi, libtvm_runtime and compiled ones.

`tvm` is not imported, so the compiler (259 MB) is never mapped. Loading runs native code: check
an artifact's hashes before.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import sys
import threading
from pathlib import Path

from .. import host
from ..errors import ArtifactError, TargetError
from . import native, openmp
from .abi import Ffi, Object

_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


@functools.cache
def runtime() -> Ffi:
    """The TVM runtime of this process, loaded on first use.

    Raises TargetError in one sentence when the pinned packages are absent or others.
    """
    host.check_packages()
    # Both go into the global namespace: compiled libraries look their symbols up there.
    ffi = load_native("tvm_ffi", f"libtvm_ffi{_SUFFIX}")
    load_native("tvm", f"libtvm_runtime{_SUFFIX}")
    return Ffi(ffi)


def backend() -> ctypes.CDLL:
    """libtvm_runtime, for the few C++ symbols that have no registered function."""
    runtime()
    return load_native("tvm", f"libtvm_runtime{_SUFFIX}")


def optional(package: str, name: str) -> bool:
    """Load a further library of a package if it has one of that name; whether it did."""
    runtime()
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or ()
    if not any((Path(folder) / "lib" / f"{name}{_SUFFIX}").is_file() for folder in folders):
        return False
    load_native(package, f"{name}{_SUFFIX}")
    return True


class Library:
    """A compiled library (see `open_library`); functions are looked up by symbol, then kept.

    `entries` are its C functions, None where it has none.
    """

    def __init__(self, path: Path, spelled: str) -> None:
        self._ffi = runtime()
        self._path = path
        self._get = self._ffi.function("ffi.ModuleGetFunction")
        load = self._ffi.function("ffi.ModuleLoadFromFile")
        self._module = self._ffi.call(load, spelled)
        self._functions: dict[str, Object] = {}
        self.entries: native.Entries | None = None
        try:
            library = ctypes.CDLL(spelled)
        except OSError:  # code for a GPU may name what only its driver has
            return
        openmp.add(library)
        with contextlib.suppress(AttributeError):  # an earlier moec made it
            self.entries = native.Entries(library)

    def function(self, symbol: str) -> Object:
        """The compiled function `symbol`; ArtifactError if the library does not have it."""
        found = self._functions.get(symbol)
        if found is None:
            found = self._ffi.call(self._get, self._module, symbol, False)
            if found is None:
                raise ArtifactError(
                    f"the library has no function {symbol!r}",
                    where=str(self._path),
                    need="every symbol that the manifest names",
                    hint="compile the artifact again",
                )
            self._functions[symbol] = found
        return found


_Identity = tuple[int, int, int]  # device, inode, time of the last change
_lock = threading.Lock()
_loaded: dict[Path, dict[_Identity, Library]] = {}


def open_library(path: Path) -> Library:
    """The library at `path`, loaded once a process and never unloaded.

    The code keeps handles of its first module's kernels in variables of its own: a second module
    of the same file would call through them when the first is gone, and the process would die.
    """
    path = path.resolve()
    stat = path.stat()
    identity = stat.st_dev, stat.st_ino, stat.st_mtime_ns
    with _lock:
        known = _loaded.setdefault(path, {})
        if identity not in known:
            # The dynamic linker takes a name that it knows for what it loaded by that name: an
            # artifact that was compiled again is spelled differently.
            spelled = f"{path.parent}/{'./' * len(known)}{path.name}"
            known[identity] = Library(path, spelled)
        return known[identity]


@functools.cache
def load_native(package: str, name: str) -> ctypes.CDLL:
    """The library `name` of an installed package, in the global symbol namespace.

    Raises TargetError when the package does not have it or it does not load.
    """
    spec = importlib.util.find_spec(package)  # finds, does not import
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / "lib" / name
        if path.is_file():
            try:
                return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise TargetError(f"{name} cannot be loaded: {error}", where=str(path)) from None
    pins = " ".join(f"{key}=={versions[0]}" for key, versions in host.PINNED.items())
    raise TargetError(f"package {package} has no {name}", need=pins, hint=f"pip install {pins}")
