"""What belongs to the calling thread: TVM's worker pool and the workspace.

TVM keeps one pool per calling thread. Left alone it takes half of the cores and pins the
caller to them; here it gets all cores that the process may use, of which a call uses what
it asks for, and the caller keeps its affinity. Work is split into `num_threads` chunks
whatever the size of the pool, so the pool changes no result. Where torch works in the process,
the main thread's calls run on those of its OpenMP runtime instead (see openmp).

An idle worker yields _SPINS times before it sleeps, and cannot be ended sooner. TVM's own
300 000 yields take 0.1 s where nothing else runs, but minutes on a machine with other work,
which a yield lets run: so long would a process take to exit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import host
from ..artifact import ALIGNMENT
from ..errors import ResourceError
from . import openmp
from .libraries import backend, runtime
from .native import Thread
from .tensors import address

# Affinity mode of TVM's pool: workers may run on every core of the list.
_SHARE_ALL_CORES = -3
# C++ functions of the pinned runtime that are not registered under a name.
_RESET = "_ZN3tvm7runtime9threading15ResetThreadPoolEv"
_SET_MAX = "_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"
_SPIN_COUNT = "TVM_THREAD_POOL_SPIN_COUNT"
_SPINS = "200"  # about 0.1 ms: longer than the serial parts between the loops of a call
_LAMBDA = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
# Where the pinned runtime has the number of tasks, and that of unfinished ones, from the address
# that a task gets: struct {void* sync; int32_t num_task}, a bool, int32_t.
_TASKS, _PENDING = 8, 20


class _ThreadState(threading.local):
    cores = 0  # threads that the pool has, 0 before it exists
    pool = 0  # threads that the pool is configured to use
    serial = False  # a forked child whose workers could not be renewed
    held: _Held | None = None  # workers that wait for a fork to be over
    buffer = np.empty(0, np.uint8)  # the workspace, with room to align it

    def __init__(self) -> None:
        self.ready = Thread()  # `workers`: threads that the last call on this thread used
        if threading.current_thread() is threading.main_thread():
            global _main
            _main = self.ready


_main: Thread | None = None  # the main thread's
_state = _ThreadState()
_shared = False  # whether the main thread's loops run on torch's threads


def thread() -> Thread:
    """What the calling thread has ready, as C reads it; the same one as long as it runs."""
    return _state.ready


def workspace(size: int) -> int:
    """Address of at least `size` bytes, 64-byte aligned, that belong to this thread."""
    state, ready = _state, _state.ready
    if ready.size < size:
        # A call with T a little larger than the last must not allocate each time.
        wanted = max(size, min(2 * ready.size, size + (64 << 20)))
        try:
            state.buffer = np.empty(wanted + ALIGNMENT, np.uint8)
        except MemoryError:
            raise ResourceError(
                f"a call needs {size / 1e9:.2f} GB of workspace, which cannot be allocated",
                hint="pass fewer tokens at once",
            ) from None
        ready.space = -(-address(state.buffer) // ALIGNMENT) * ALIGNMENT
        ready.size = wanted
    return ready.space or 0


def use_workers(count: int) -> None:
    """Let the next call on this thread use `count` threads, the caller being one of them.

    `count` must not exceed the cores that this process may use. With 1, no pool is made.
    """
    ready = _state.ready
    if ready.workers != count:
        _switch(count)
        ready.workers = count


def use_threads_of(torch: Any) -> None:
    """Let the main thread's calls run on the threads of torch's OpenMP runtime, if it has one."""
    global _shared
    if not _shared and openmp.share(torch):
        _shared = True
        if _main is not None:
            _main.workers = 0  # its next call switches


def _switch(count: int) -> None:
    state = _state
    if _shared and threading.current_thread() is threading.main_thread():
        openmp.workers()(count)
        return
    if state.serial:
        return
    if count == 1:
        backend()[_SET_MAX](1)  # the caller then runs every chunk itself
        return
    if not state.cores:
        cores = max(count, host.cores())
        with _affinity_kept() as cpus, _few_spins():
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


@contextlib.contextmanager
def _few_spins() -> Iterator[None]:
    """The first worker of the process reads the count once; a user's own value stays."""
    if _SPIN_COUNT in os.environ:
        yield
        return
    os.environ[_SPIN_COUNT] = _SPINS
    try:
        yield
    finally:
        os.environ.pop(_SPIN_COUNT, None)  # two threads may have set it


class _Held:
    """Workers kept within a task, so that none of them sleeps while the process forks.

    A child can neither end nor destroy a queue whose worker slept when it was copied: it would
    wait for it for ever, at its first call or when it exits.
    """

    def __init__(self) -> None:
        self._others = 0
        self._arrived, self._gate = threading.Semaphore(0), threading.Event()
        self._pending: ctypes.c_int | None = None
        self._task = _LAMBDA(self._run)
        backend().TVMBackendParallelLaunch(self._task, None, 0)

    def __bool__(self) -> bool:
        return self._pending is not None

    def _run(self, number: int, env: int, _: int) -> int:
        if number:
            self._arrived.release()
            self._gate.wait()
            return 0
        tasks = ctypes.c_int.from_address(env + _TASKS).value
        pending = ctypes.c_int.from_address(env + _PENDING)
        if 1 < pending.value == tasks <= _state.cores and self._all_arrive(tasks - 1):
            self._others = tasks - 1
            # The launch waits for this task alone, and leaves the others where they are.
            pending.value = 1
            self._pending = pending
        else:  # not the memory that it should be
            self._gate.set()
        return 0

    def _all_arrive(self, others: int) -> bool:
        # A minute is for ever: a pool that is not what it should be must not stop a fork.
        return all(self._arrived.acquire(timeout=60) for _ in range(others))

    def release(self) -> None:
        """Let the workers go, and wait until the last one has counted itself out."""
        self._gate.set()
        while self._pending is not None and self._pending.value > -self._others:
            time.sleep(0)


def _before_fork() -> None:
    state = _state
    if sys.platform == "linux" and state.cores > 1 and not state.serial:
        with _affinity_kept() as cpus:
            _configure(state.cores, cpus, state.cores)
        state.pool = state.cores
        state.held = _Held()


def _after_fork_in_parent() -> None:
    if _state.held is not None:
        _state.held.release()
        _state.held = None


def _after_fork_in_child() -> None:
    """The child's workers are gone: make new ones, or let its one thread work alone."""
    global _shared
    state = _state
    # Threads that torch's runtime had are gone as well, and it would wait for them for ever,
    # also where calls begin to use it in the child.
    openmp.leave()
    if _shared:
        _shared, state.ready.workers = False, 0
    if state.cores <= 1:
        return
    if state.held:
        with _affinity_kept() as cpus:
            backend()[_RESET]()
            _configure(state.pool, cpus, state.cores)
        state.ready.workers = 0
    else:
        backend()[_SET_MAX](1)
        state.serial = True
    state.held = None


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
