"""What users are promised from end to end, on real artifacts: same bytes, damage, kills, threads.

The parts (writer, reader, tensors, pool) have tests of their own with an artifact written by
hand; here compiled ones go through the same doors.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import moec
from moec import cli
from moec.errors import InputError
from moec.ops import reference
from moec.spec import ExpertsSpec, MoESpec, RouterSpec
from tests import tiny
from tests.blocks import Built, Small, bits, built, error, inputs
from tests.conftest import Compiled


def process(code: str, *args: str | Path, **env: str) -> subprocess.Popen[str]:
    """A fresh interpreter that runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
    )


def output(child: subprocess.Popen[str], timeout: float = 120) -> str:
    out, err = child.communicate(timeout=timeout)
    assert child.returncode == 0, err[-3000:]
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A float32 and a bfloat16 block."""
    specs = [
        MoESpec(dtype, RouterSpec(6, 2), ExpertsSpec(6, 2, 24, 16))
        for dtype in ("float32", "bfloat16")
    ]
    blocks = [Small(spec, ("fused",)) for spec in specs]
    return built(blocks, tmp_path_factory.mktemp("guarantees"))


COMPILE = """
import sys
import moec
print(moec.compile(sys.argv[1], out=sys.argv[2], schedules=["fused", "gather"]).digest)
"""


def test_same_input_same_bytes(tmp_path: Path) -> None:
    """Two processes, two folders, two seeds of the hash function, two places of the source."""
    children, outs = [], []
    for n in (1, 2):
        folder = tmp_path / f"folder-{n}" / ("deeper" * n)
        tiny.write(folder / "model")
        outs.append(folder / f"out{n}.moec")
        children.append(
            process(COMPILE, folder / "model", outs[-1], PYTHONHASHSEED=str(n), TZ=f"UTC-{n}")
        )
    first, second = (output(child) for child in children)
    assert first == second and len(first.strip()) == 64
    files = [sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file()) for out in outs]
    assert files[0] == files[1]
    for name in files[0]:
        data = (outs[0] / name).read_bytes()
        assert data == (outs[1] / name).read_bytes(), name
        assert str(tmp_path).encode() not in data, f"{name} names the folder it was made in"


def test_one_flipped_byte_is_refused(
    compiled: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In any file, through `moec verify` and moec.load; nothing of the library is mapped."""
    _, _, loaded = compiled("mixtral", "a", "float32")
    path = tmp_path / "flipped.moec"
    shutil.copytree(loaded.path, path)
    assert cli.main(["verify", str(path), "-q"]) == 0
    places = random.Random(11)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    assert {f.suffix for f in files} == {".json", ".so", ".py", ".safetensors"}
    for file in files:
        data = bytearray(file.read_bytes())
        for place in (0, len(data) - 1, *places.sample(range(len(data)), 6)):
            bit = 1 << places.randrange(8)
            data[place] ^= bit
            file.write_bytes(data)
            data[place] ^= bit
            assert cli.main(["verify", str(path)]) == 5, f"{file} at {place}"
            with pytest.raises(moec.MoecError) as caught:
                moec.load(path)
            assert caught.value.exit_code == 5
        file.write_bytes(data)
    assert "moec: error:" in capsys.readouterr().err
    assert str(path) not in Path("/proc/self/maps").read_text() or sys.platform != "linux"
    moec.load(path)


# Children are forked from one process that has imported the compiler, two at a time. Half of
# them are killed anywhere in a compilation, half in the moments after it began to pack.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import moec
import moec.compiler
from moec.artifact import Artifact
from moec.errors import UsageError

model, root, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
random.seed(4)
options = dict(schedules=["gather"], layers=[0])

def compiling(path, ready):
    def progress(text):
        if text.startswith("pack"):
            os.write(ready, b"p")
    os.write(ready, b"s")
    try:
        moec.compile(model, out=path, force=True,
                     options=moec.CompileOptions(progress=progress), **options)
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(9)
    os._exit(0)

def start(path):
    reader, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        compiling(path, ready)
    os.close(ready)
    return pid, reader

def state(path):
    try:
        return Artifact.open(path).manifest.digest  # every byte is checked
    except UsageError:
        assert not path.exists(), "half an artifact"
        return None

# How long one compilation takes, of two at once.
begin = time.perf_counter()
pairs = [start(root / f"{n}.moec") for n in range(2)]
for pid, reader in pairs:
    assert os.waitpid(pid, 0)[1] == 0
    os.close(reader)
whole = time.perf_counter() - begin
digest = state(root / "0.moec")
assert digest and state(root / "1.moec") == digest
for n in range(2):
    (root / f"{n}.moec").rename(root / f"old-{n}.moec")

counts = {"absent": 0, "whole": 0, "finished": 0}
for turn in range(0, rounds, 2):
    pairs = []
    for n in range(2):
        path = root / f"{n}.moec"
        if turn % 6 == 0 and path.exists():
            path.rename(root / f"old-{turn}-{n}")
        pairs.append((path, *start(path)))
    if turn % 4 == 0:
        time.sleep(random.uniform(0, whole))
    else:
        reader = pairs[turn // 4 % 2][2]
        while os.read(reader, 1) == b"s":
            pass
        time.sleep(random.uniform(0, 0.05))
    for path, pid, reader in pairs:
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        os.close(reader)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL), code
        counts["finished"] += code == 0
        found = state(path)
        assert found in (None, digest)
        counts["absent" if found is None else "whole"] += 1
left = [p.name for p in root.iterdir() if p.name.startswith(".")]
assert left, "no child was killed while it wrote"
for n in range(2):
    moec.compile(model, out=root / f"{n}.moec", force=True, **options)
    moec.load(root / f"{n}.moec")
assert not [p.name for p in root.iterdir() if p.name.startswith(".")]
print(counts, len(left), round(whole, 2))
"""


def test_thirty_kills_leave_nothing_half_written(tmp_path: Path) -> None:
    tiny.write(tmp_path / "model")
    (tmp_path / "out").mkdir()
    print(output(process(KILLER, tmp_path / "model", tmp_path / "out", "30"), timeout=600))


def test_eight_threads(small: Built) -> None:
    """One block, eight threads, each with inputs of its own."""
    block, one = small.loaded[0], small.blocks[0]
    start, wrong = threading.Barrier(8), list[str]()

    def work(seed: int) -> None:
        cases = [inputs(one.spec, tokens, seed) for tokens in (seed + 1, 0, 40)]
        wanted = [reference.experts(one.spec, one.parameters, *case) for case in cases]
        whole = [reference.moe(one.spec, one.parameters, x, block.route(x)) for x, _, _ in cases]
        start.wait()
        for turn in range(30):
            for case, want, total in zip(cases, wanted, whole, strict=True):
                # 1e-5 of the norm: float32 sums in an order of our own.
                if not error(block.experts(*case), want) <= 1e-5:
                    wrong.append(f"experts, thread {seed}, turn {turn}")
                if not error(block(case[0]), total) <= 1e-5:
                    wrong.append(f"moe, thread {seed}, turn {turn}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def crooked(array: Any, offset: int) -> Any:
    """A copy of an array that starts `offset` bytes after a multiple of 64."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    out = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def test_tensors_that_do_not_fit(small: Built) -> None:
    x, ids, weights = inputs(small.blocks[0].spec, 6)
    block, half = small.loaded[0], small.loaded[1]
    tensor = torch.from_numpy(x)
    bad: dict[str, Any] = {
        "crooked": crooked(x, 1),
        "columns": np.asfortranarray(x),
        "steps": np.concatenate([x, x])[::2],
        "turned": tensor.T.contiguous().T,
        "float64": x.astype(np.float64),
        "bfloat16": tensor.bfloat16(),
        "narrow": x[:, :-1].copy(),
        "flat": x.reshape(-1),
        "elsewhere": torch.zeros(6, 24, device="meta"),
    }
    for name, one in bad.items():
        for call in (block, block.route, lambda v: block.experts(v, ids, weights)):
            with pytest.raises(InputError) as caught:
                call(one)
            assert caught.value.where == "x", name
    for arguments in ((x, ids[:, :1], weights), (x, ids, weights[:5]), (x, weights, weights)):
        with pytest.raises(InputError):
            block.experts(*arguments)
    with pytest.raises(InputError, match="float32"):
        half(x)


@pytest.mark.parametrize("layer", [0, 1])
def test_any_element_alignment_is_fine(small: Built, layer: int) -> None:
    """Kernels read a caller's tensors at any multiple of an element, with the same bits."""
    x, ids, weights = inputs(small.blocks[layer].spec, 13)
    block = small.loaded[layer]
    want = block(x), block.experts(x, ids, weights)
    for offset in range(0, 64, 4):
        args = crooked(x, offset), crooked(ids, 64 - offset), crooked(weights, offset)
        out = crooked(x, 60 - offset)
        np.testing.assert_array_equal(bits(block(args[0], out=out)), bits(want[0]))
        np.testing.assert_array_equal(bits(block.experts(*args)), bits(want[1]))


def test_bfloat16_in_and_out_without_a_copy(small: Built) -> None:
    """torch and ml_dtypes: the same bits, results of the caller's kind, in the caller's memory."""
    x, ids, weights = inputs(small.blocks[1].spec, 9)
    assert x.dtype == ml_dtypes.bfloat16
    block = small.loaded[1]
    want = block.experts(x, ids, weights)
    assert want.dtype == ml_dtypes.bfloat16
    tensor = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    assert tensor.data_ptr() == x.ctypes.data
    y = block.experts(tensor, torch.from_numpy(ids), torch.from_numpy(weights))
    assert y.dtype == torch.bfloat16
    np.testing.assert_array_equal(y.view(torch.int16).numpy(), want.view(np.int16))
    out = torch.zeros_like(tensor)
    assert block(tensor, out=out) is out
    place = np.zeros_like(x)
    assert block(x, out=place) is place
    np.testing.assert_array_equal(out.view(torch.int16).numpy(), place.view(np.int16))
    assert np.count_nonzero(place.view(np.int16))


FRESH = """
import sys
import moec
model = moec.load(sys.argv[1])
import numpy as np
y = model[0](np.ones((3, 24), np.float32))
assert y.shape == (3, 24) and np.isfinite(y).all()
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
assert "libtvm_compiler" not in maps and "tvm" not in sys.modules
"""


def test_loading_maps_no_compiler(small: Built) -> None:
    output(process(FRESH, small.paths[0]))
