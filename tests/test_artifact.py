"""Artifacts on disk: layout, reproducibility, replacing, crashes and full disks."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from moec.artifact import Artifact, ArtifactWriter, is_artifact, read_entries, tensorfile
from moec.artifact import disk as disk_module
from moec.errors import ResourceError, UsageError
from tests.runtime import fake

LAYOUT = [
    ("big", "uint16", (4, 32)),
    ("vector", "float32", (5,)),
    ("empty", "float32", (0, 7)),
    ("last", "float16", (3, 3)),
]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Stands for a compiled library: the writer does not look inside."""
    path = tmp_path / "library.so"
    path.write_bytes(b"\x7fELF" + bytes(range(256)))
    return path


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {name: random.integers(0, 99, shape).astype(dtype) for name, dtype, shape in LAYOUT}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_round_trip(tmp_path: Path, library: Path) -> None:
    digest = fake.write(tmp_path / "a.moec", library)
    artifact = Artifact.open(tmp_path / "a.moec")
    manifest = artifact.manifest
    assert manifest.digest == digest
    assert [block.layer for block in manifest.blocks] == [1, 3]
    assert manifest.shapes["b0"].spec == fake.spec("float32")
    function = manifest.targets["cpu-fake"].shapes["b0"].functions["experts"]
    assert [t.shape for t in function.inputs] == [("T", 8), ("T", 2), ("T", 2)]
    assert [v.tokens for v in function.variants] == [(0, 100000), None]
    for name, entry in manifest.files.items():
        data = artifact.file(name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry.sha256, entry.bytes)


def test_equal_input_gives_equal_bytes(tmp_path: Path, library: Path) -> None:
    folders = [tmp_path / "a.moec", tmp_path / "elsewhere" / "b.moec"]
    folders[1].parent.mkdir()
    assert len({fake.write(folder, library) for folder in folders}) == 1
    for name in [*Artifact.open(folders[0]).manifest.files, "manifest.json"]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    text = (folders[0] / "manifest.json").read_text()
    assert str(tmp_path) not in text


def test_weight_files_are_aligned_safetensors(tmp_path: Path) -> None:
    expected = arrays()
    with ArtifactWriter(tmp_path / "a.moec") as writer:
        with writer.tensors("weights/w.safetensors", LAYOUT) as out:
            for row in expected["big"]:
                out.write("big", row)
            out.write("vector", expected["vector"])
            out.write("last", expected["last"])
        path = writer._stage / "weights/w.safetensors"
        loaded = safetensors.numpy.load_file(path)
        pads = [name for name in loaded if name.startswith("pad.")]
        assert sorted(loaded) == sorted([*expected, *pads])
        for name, array in expected.items():
            np.testing.assert_array_equal(loaded[name], array)
        entries = read_entries(path)
        first = min(e.offset for e in entries.values())
        assert first % 4096 == 0
        assert all(e.offset % 64 == 0 for e in entries.values())
        assert writer._files["weights/w.safetensors"] == {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }


def test_weight_files_are_written_in_whole_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that they lie on huge pages of the page cache, whatever pieces a tensor comes in."""
    monkeypatch.setattr(tensorfile, "BLOCK", 64)
    random = np.random.default_rng(1)
    arrays = {f"t{n}": random.integers(0, 256, n * 37 % 400, np.uint8) for n in range(30)}
    sizes: list[int] = []

    class File(io.BytesIO):
        def write(self, data: Any) -> int:
            sizes.append(len(data))
            return super().write(data)

    file = File()
    triples = [(name, "uint8", a.shape) for name, a in arrays.items()]
    writer = tensorfile.TensorFileWriter(file, triples, tmp_path)
    for name, array in arrays.items():
        for piece in np.split(array, sorted(random.integers(0, array.size + 1, 2))):
            if piece.size:
                writer.write(name, piece)
    digest = writer.finish()
    assert hashlib.sha256(file.getvalue()).hexdigest() == digest
    assert writer.bytes == len(file.getvalue())
    assert all(size % 64 == 0 for size in sizes[:-1]) and max(sizes) > 64
    path = tmp_path / "file"
    path.write_bytes(file.getvalue())
    for name, entry in read_entries(path).items():
        got = file.getvalue()[entry.offset : entry.offset + entry.bytes]
        assert got == arrays[name].tobytes()


def test_tensors_must_come_in_order_and_whole(tmp_path: Path) -> None:
    expected = arrays()
    with ArtifactWriter(tmp_path / "a.moec") as writer:
        with pytest.raises(ValueError, match="not the next one"):
            with writer.tensors("weights/1.safetensors", LAYOUT) as out:
                out.write("vector", expected["vector"])
        with pytest.raises(ValueError, match="overflows"):
            with writer.tensors("weights/2.safetensors", LAYOUT) as out:
                out.write("big", np.zeros(1000, np.uint16))
        with pytest.raises(ValueError, match="'vector' is incomplete"):
            with writer.tensors("weights/3.safetensors", LAYOUT) as out:
                out.write("big", expected["big"])


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ArtifactWriter(tmp_path / "a.moec") as writer:
        writer.add_bytes("ir/b0.py", b"x")
        raise RuntimeError
    assert names(tmp_path) == []


def test_a_manifest_that_no_reader_takes_is_not_written(tmp_path: Path) -> None:
    with (
        pytest.raises(Exception, match="its weight file"),
        ArtifactWriter(tmp_path / "a.moec") as w,
    ):
        w.finish(fake.document("float32"))
    assert names(tmp_path) == []


def test_existing_output_needs_force(tmp_path: Path, library: Path) -> None:
    path = tmp_path / "a.moec"
    fake.write(path, library)
    before = Artifact.open(path).manifest.digest
    with pytest.raises(UsageError, match="the output exists") as caught:
        fake.write(path, library)
    assert "--force" in str(caught.value)
    library.write_bytes(b"another library")
    after = fake.write(path, library, force=True)
    assert before != after == Artifact.open(path).manifest.digest
    assert names(tmp_path) == ["a.moec", "library.so"]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "foreign"])
def test_what_is_no_artifact_is_never_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.moec"
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
        (path / "manifest.json").write_text('{"format": "other"}' if kind == "foreign" else "[]")
    with pytest.raises(UsageError, match="not an artifact"):
        ArtifactWriter(path, force=True)
    assert os.path.lexists(path)


def test_an_empty_folder_is_filled(tmp_path: Path, library: Path) -> None:
    (tmp_path / "a.moec").mkdir()
    fake.write(tmp_path / "a.moec", library)
    assert is_artifact(tmp_path / "a.moec")


def test_the_parent_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist") as caught:
        ArtifactWriter(tmp_path / "no" / "a.moec")
    assert "mkdir -p" in str(caught.value)


def test_two_writers_of_one_artifact(tmp_path: Path, library: Path) -> None:
    path = tmp_path / "a.moec"
    with ArtifactWriter(path) as late:
        fake.write(path, library)
        late.add_file("lib/cpu-fake.so", library)
        for layer in (1, 3):
            late.add_bytes(f"weights/layer-{layer:05d}.safetensors", b"")
        with pytest.raises(UsageError, match="the output exists"):
            late.finish(fake.document("float32"))
    assert names(tmp_path) == ["a.moec", "library.so"]
    Artifact.open(path)


def test_remains_of_dead_writers_are_swept(tmp_path: Path, library: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for name in ("tmp", "old"):
        (tmp_path / f".a.moec.{name}-{process.pid}-0123abcd").mkdir()
    alive = tmp_path / f".a.moec.tmp-{os.getpid()}-0123abcd"
    other = tmp_path / f".b.moec.tmp-{process.pid}-0123abcd"
    alive.mkdir()
    other.mkdir()
    fake.write(tmp_path / "a.moec", library)
    assert names(tmp_path) == sorted([alive.name, other.name, "a.moec", "library.so"])


def test_a_locked_staging_folder_is_not_swept(tmp_path: Path, library: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    stage = tmp_path / f".a.moec.tmp-{process.pid}-0123abcd"  # as from another container
    stage.mkdir()
    fd = disk_module.lock(stage)
    assert fd is not None
    fake.write(tmp_path / "a.moec", library)
    os.close(fd)
    assert stage.exists()


def test_a_disk_without_room_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match=r"needs 0\.01 GB more"):
        with ArtifactWriter(tmp_path / "a.moec") as writer:
            with writer.tensors("w.safetensors", [("big", "uint8", (10_000_000,))]):
                pass
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(ResourceError, match="the disk is full") as caught:
            with ArtifactWriter(tmp_path / "a.moec") as writer:
                with writer.tensors("w.safetensors", [("big", "uint8", (4 << 20,))]) as out:
                    for _ in range(64):
                        out.write("big", np.zeros(1 << 16, np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == 6
    assert names(tmp_path) == []


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from moec.artifact import Artifact, ArtifactWriter
from moec.errors import UsageError
from tests.runtime import fake

root, rounds = Path(sys.argv[1]), int(sys.argv[2])
library = root / "library.so"
random.seed(5)
counts = {"old": 0, "new": 0, "none": 0}
path = root / "a.moec"
last = None
for turn in range(rounds):
    library.write_bytes(os.urandom(1 << 20))
    if turn % 3 == 0:
        import shutil
        shutil.rmtree(path, ignore_errors=True)
        last = None
    started, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(ready, b".")
        fake.write(path, library, force=True)
        os._exit(0)
    os.read(started, 1)
    time.sleep(random.uniform(0, 0.06))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        digest = Artifact.open(path).manifest.digest
        counts["old" if digest == last else "new"] += 1
        last = digest
    except UsageError:
        counts["none"] += 1
        last = None
fake.write(path, library, force=True)
left = sorted(p.name for p in root.iterdir())
assert left == ["a.moec", "library.so"], left
print(counts)
"""


def test_killed_writers_leave_nothing_half_written(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), "30"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    print(run.stdout)


def test_opening_may_leave_the_weights_unread(tmp_path: Path, library: Path) -> None:
    fake.write(tmp_path / "a.moec", library)
    weights = tmp_path / "a.moec" / "weights" / "layer-00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    Artifact.open(tmp_path / "a.moec", verify="library")  # documented: weights are not hashed


def test_manifest_is_canonical_json(tmp_path: Path, library: Path) -> None:
    fake.write(tmp_path / "a.moec", library)
    data = (tmp_path / "a.moec" / "manifest.json").read_bytes()
    document = json.loads(data)
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    assert text.encode() == data
