"""Several Python threads, forks and TVM's worker pool: right results, no hang, no overrun."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import moec.runtime
from tests.runtime import fake


def run(code: str, *args: str, **env: str) -> str:
    """Run code in a fresh process, so that a crash or a hang fails one test only."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_eight_threads_call_one_block() -> None:
    block = moec.runtime.load(fake.shared())[1]
    start = threading.Barrier(8)
    failures: list[str] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        start.wait()
        for turn in range(60):
            tokens = int(random.integers(0, 40))
            x = random.normal(size=(tokens, fake.H)).astype("f4")
            ids = random.integers(-1, fake.E + 1, (tokens, fake.K)).astype("i4")
            w = random.random((tokens, fake.K)).astype("f4")
            y = block.experts(x, ids, w)
            if not np.allclose(y, fake.experts(x, ids, w), rtol=1e-5, atol=1e-5):
                failures.append(f"thread {seed} turn {turn}")
            if not np.array_equal(block(x), 2 * x):
                failures.append(f"thread {seed} turn {turn} moe")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_caller_keeps_its_cores() -> None:
    out = run(
        """
        import os, sys
        import numpy as np, moec.runtime
        before = os.sched_getaffinity(0)
        moec.runtime.load(sys.argv[1])[1](np.ones((4, 8), "f4"))
        assert os.sched_getaffinity(0) == before
        tasks = [int(t) for t in os.listdir("/proc/self/task")]
        print(all(os.sched_getaffinity(t) == before for t in tasks))
        """,
        str(fake.shared()),
    )
    assert out.strip() == "True"


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only there torch's threads are shared")

FORK = """
import os, sys, threading, time
import numpy as np, moec.runtime
block = moec.runtime.load(sys.argv[1])[1]
x = np.ones((64, 8), "f4")
if sys.argv[4:]:
    import torch
    big = torch.ones(600, 600)
    big @ big
    if sys.argv[4] == "parent":  # that calls with tensors; else only the child does
        assert (block(torch.from_numpy(x)) == 2).all()
assert (block(x) == 2).all()
time.sleep(float(sys.argv[2]))  # workers spin for a while, then they sleep
pid = os.fork()
if pid == 0:
    if sys.argv[4:]:
        x = torch.from_numpy(x)
    ok = [bool((block(x) == 2).all()) for _ in range(3)] if sys.argv[3] == "use" else []
    other = []
    for _ in range(4):
        thread = threading.Thread(target=lambda: other.append(bool((block(x) == 2).all())))
        thread.start()
        thread.join()
    sys.exit(0 if all(ok) and other == [True] * 4 else 9)  # runs C++ destructors
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert (block(x) == 2).all()
print(code)
"""


@pytest.mark.parametrize("use", ["use", "idle"])
@pytest.mark.parametrize("pause", ["0", "1.5"])
def test_a_forked_child_goes_on_and_ends(pause: str, use: str) -> None:
    assert run(FORK, str(fake.shared()), pause, use).strip() == "0"


@pytest.mark.parametrize("who", ["parent", "child"])
def test_a_child_of_a_process_in_which_torch_works(who: str) -> None:
    """The threads of torch's OpenMP runtime are gone there, and it would wait for them."""
    pytest.importorskip("torch")
    assert run(FORK, str(fake.shared()), "0", "use", who).strip() == "0"


TORCH = """
import os, sys, time
import numpy as np, moec.runtime, torch
from moec import host
from moec.runtime import openmp
assert not openmp.share(torch)  # no library is there that could
torch.set_num_threads(int(sys.argv[2]) * host.cores())
x = torch.randn(600, 600)
for _ in range(3):
    x @ x
before = set(os.listdir("/proc/self/task"))
block = moec.runtime.load(sys.argv[1])[1]
x = torch.randn(64, 8)
for threads in (host.cores(), 1):
    block = moec.runtime.load(sys.argv[1], threads=threads)[1]
    assert torch.equal(block(x), 2 * x)
assert np.array_equal(block(x.numpy()), 2 * x.numpy())
end = time.monotonic() + 10  # threads that have ended are listed for a moment
while set(os.listdir("/proc/self/task")) - before and time.monotonic() < end:
    time.sleep(0.01)
print(openmp.workers() is not None, not set(os.listdir("/proc/self/task")) - before)
"""


@LINUX
def test_loops_run_on_the_threads_of_torch() -> None:
    pytest.importorskip("torch")
    assert run(TORCH, str(fake.shared()), "1").strip() == "True True"


@LINUX
def test_more_threads_of_torch_than_cores_are_not_shared() -> None:
    pytest.importorskip("torch")
    assert run(TORCH, str(fake.shared()), "3").split()[0] == "False"


def test_a_process_ends_while_others_keep_every_core_busy() -> None:
    """A worker that yields 300 000 times to them would end after many minutes."""
    burn = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(3 * (os.cpu_count() or 1))
    ]
    try:
        assert run(FORK, str(fake.shared()), "0", "use").strip() == "0"
    finally:
        for process in burn:
            process.kill()
            process.wait()


def test_a_pool_that_grows_stays_in_its_memory() -> None:
    """The C library checks the heap here: TVM's launcher overruns when a pool grows by one."""
    code = """
    import sys
    import numpy as np, moec.runtime
    from moec import host
    host.cores = lambda: 6  # more workers than the machine has, but the same code
    from moec.runtime.libraries import runtime
    x = np.ones((64, 8), "f4")
    sizes = []
    for count in (1, 2, 3, 1, 4, 6, 2, 1):
        block = moec.runtime.load(sys.argv[1], threads=count)[1]
        for _ in range(5):
            assert (block(x) == 2).all()
        if count > 1:
            sizes.append(runtime().call(runtime().function("runtime.NumThreads")))
    print(sizes)
    """
    checks = {"GLIBC_TUNABLES": "glibc.malloc.check=3"}
    library = "/lib/x86_64-linux-gnu/libc_malloc_debug.so.0"
    if os.path.exists(library):
        checks["LD_PRELOAD"] = library
    assert run(code, str(fake.shared()), **checks).strip() == "[2, 3, 4, 6, 6]"
