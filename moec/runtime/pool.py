"""What belongs to the calling thread: TVM's worker pool and the workspace.

TVM keeps one pool per calling thread. Left alone it takes half of the cores and pins the
caller to them; here it gets all cores that the process may use, of which a call uses what
it asks for, and the caller keeps its affinity. Work is split into `num_threads` chunks
whatever the size of the pool, so the pool changes no result.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator

import numpy as np

from .. import host
from ..errors import ResourceError
from .libraries import backend, runtime
from .tensors import address

_ALIGNMENT = 64
# Affinity mode of TVM's pool: workers may run on every core of the list.
_SHARE_ALL_CORES = -3
# C++ functions of the pinned runtime that are not registered under a name.
_RESET = "_ZN3tvm7runtime9threading15ResetThreadPoolEv"
_SET_MAX = "_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"


class _ThreadState(threading.local):
    count = 0  # threads that the last call on this thread used
    cores = 0  # threads that the pool has, 0 before it exists
    pool = 0  # threads that the pool is configured to use
    serial = False  # a forked child whose workers could not be renewed
    space = np.empty(0, np.uint8)
    address = 0
    size = 0


_state = _ThreadState()


def workspace(size: int) -> int:
    """Address of at least `size` bytes, 64-byte aligned, that belong to this thread."""
    state = _state
    if state.size < size:
        # A call with T a little larger than the last must not allocate each time.
        wanted = max(size, min(2 * state.size, size + (64 << 20)))
        try:
            state.space = np.empty(wanted + _ALIGNMENT, np.uint8)
        except MemoryError:
            raise ResourceError(
                f"a call needs {size / 1e9:.2f} GB of workspace, which cannot be allocated",
                hint="pass fewer tokens at once",
            ) from None
        state.address = -(-address(state.space) // _ALIGNMENT) * _ALIGNMENT
        state.size = wanted
    return state.address


def use_workers(count: int) -> None:
    """Let the next call on this thread use `count` threads, the caller being one of them.

    `count` must not exceed the cores that this process may use. With 1, no pool is made.
    """
    if _state.count != count:
        _switch(count)
        _state.count = count


def _switch(count: int) -> None:
    state = _state
    if state.serial:
        return
    if count == 1:
        backend()[_SET_MAX](1)  # the caller then runs every chunk itself
        return
    if not state.cores:
        cores = max(count, host.cores())
        with _affinity_kept() as cpus:
            _configure(cores, cpus, cores)
            # TVM's launcher makes room for n + 1 tasks when it has counters for n. After a
            # launch of the whole pool, no later one can be larger than its counters.
            _launch_all()
            _configure(count, cpus, cores)
        state.cores, state.pool = cores, count
    if state.pool < count:
        with _affinity_kept() as cpus:
            _configure(count, cpus, state.cores)
        state.pool = count
    backend()[_SET_MAX](state.cores)


def _configure(count: int, cpus: list[int], length: int) -> None:
    """Use `count` threads on a list of `length` cores: its length is the size of a new pool."""
    ffi = runtime()
    names = [str(cpus[i % len(cpus)]) for i in range(length)]
    listing = ffi.call(ffi.function("ffi.Array"), *names)
    ffi.call(ffi.function("runtime.config_threadpool"), _SHARE_ALL_CORES, count, listing)


@contextlib.contextmanager
def _affinity_kept() -> Iterator[list[int]]:
    """The cores of the calling thread; it has the same ones afterwards."""
    if not hasattr(os, "sched_getaffinity"):
        yield [0]
        return
    before = os.sched_getaffinity(0)
    try:
        yield sorted(before)
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, before)


def _launch_all() -> None:
    """One empty launch of every thread of the pool: sched_yield stands for the task."""
    backend().TVMBackendParallelLaunch(ctypes.CDLL(None).sched_yield, None, 0)


def _before_fork() -> None:
    """Wake the workers of this thread: one that sleeps could not be cleared in the child."""
    if _renewable and _state.cores and not _state.serial:
        with _affinity_kept() as cpus:
            _configure(_state.cores, cpus, _state.cores)
        _state.pool = _state.cores
        _launch_all()


def _after_fork() -> None:
    """The child's workers are gone: make new ones, or let its one thread work alone.

    Without this, a child would wait for them for ever, at its first call or when it exits.
    """
    if not _state.cores:
        return
    if _renewable:
        with _affinity_kept() as cpus:
            backend()[_RESET]()
            _configure(_state.pool, cpus, _state.cores)
        _state.count = 0
    else:
        backend()[_SET_MAX](1)
        _state.serial = True


# Elsewhere, and where workers are told to sleep at once, they may not be cleared.
_renewable = sys.platform == "linux" and "TVM_THREAD_POOL_SPIN_COUNT" not in os.environ
os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
