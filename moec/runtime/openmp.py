"""Parallel loops of CPU libraries on the threads of torch's OpenMP runtime, if it has one.

Idle threads of torch's spin for milliseconds after each of its operations; those of a pool of
our own would share the cores with them (see moec.schedules.cpu.launcher). The OpenMP runtime is
found among the libraries of the process, never loaded. TVM's pool is used where there is none or
no library has a launcher, in a child after fork, where the threads are gone, and by all threads
but the main one: in those GNU's runtime lets its own hardly spin, so that they disturb nobody,
but take some 50 us to wake up for each loop.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

from .. import host

_FUNCTIONS = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_get_max_threads"
_LAUNCHER = "__TVMBackendParallelLaunch"  # what compiled code calls: a variable of each library


class _Shared:
    """What the process knows: its libraries, and whose threads their loops run on."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.libraries: list[ctypes.CDLL] = []
        self.workers: Any = None  # sets the threads of the calling thread's loops, once shared
        self.launch = 0
        self.before: dict[int, int] = {}  # TVM's launcher, by the variable that held it
        self.forked = False


_shared = _Shared()


def add(library: ctypes.CDLL) -> None:
    """Take note of a loaded library."""
    with _shared.lock:
        _shared.libraries.append(library)
        if _shared.launch:
            _redirect(library)


def share(torch: Any) -> bool:
    """Let loops run on torch's threads, for threads that call `workers()`; whether they can."""
    with _shared.lock:
        if _shared.launch or _shared.forked:
            return bool(_shared.launch)
        runtime = _runtime(torch)
        own = next((x for x in _shared.libraries if hasattr(x, "moec_omp_launch")), None)
        # More threads than cores (of a container, say) would all take turns in our loops.
        if runtime is None or own is None or runtime.omp_get_max_threads() > host.cores():
            return False
        before = ctypes.c_void_p.in_dll(own, _LAUNCHER)
        own.moec_omp_setup(*(_address(runtime, name) for name in _FUNCTIONS), before)
        _shared.workers = own.moec_omp_workers
        _shared.launch = _address(own, "moec_omp_launch").value or 0
        for library in _shared.libraries:
            _redirect(library)
    return True


def workers() -> Any:
    """The function by which a thread says how many of torch's its loops run on, or None."""
    return _shared.workers


def leave() -> None:
    """Back to TVM's pool for good, in a forked child."""
    for place, launcher in _shared.before.items():
        ctypes.c_void_p.from_address(place).value = launcher
    _shared.lock = threading.Lock()  # another thread of the parent may have held it
    _shared.before, _shared.launch, _shared.workers = {}, 0, None
    _shared.forked = True


def _redirect(library: ctypes.CDLL) -> None:
    try:
        variable = ctypes.c_void_p.in_dll(library, _LAUNCHER)
    except ValueError:
        return  # a library without parallel loops
    place = ctypes.addressof(variable)
    if variable.value and place not in _shared.before:
        _shared.before[place] = variable.value
        variable.value = _shared.launch


def _address(library: ctypes.CDLL, name: str) -> ctypes.c_void_p:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p)


def _runtime(torch: Any) -> ctypes.CDLL | None:
    """The OpenMP runtime that torch uses: the only one in the process, or the one beside it."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line}
    beside = {path for path in paths if Path(path).is_relative_to(Path(torch.__file__).parent)}
    found = beside if len(paths) > 1 else paths
    if len(found) != 1:
        return None
    library = ctypes.CDLL(found.pop())
    return library if all(hasattr(library, name) for name in _FUNCTIONS) else None
