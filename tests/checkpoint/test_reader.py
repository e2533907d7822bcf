"""Checkpoint: what is read is what the safetensors library wrote, as long as nobody touches it."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from moec.checkpoint import Checkpoint
from moec.checkpoint.header import DTYPES, dtype_name
from moec.errors import BadCheckpoint
from tests.checkpoint import raw
from tests.frontend import small

TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16,
    "I16": torch.int16, "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
}  # fmt: skip


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype(tmp_path: Path, code: str) -> None:
    """The bytes that torch wrote, under the dtype's name in the whole project."""
    kind = DTYPES[code][1]
    path = raw.directory(tmp_path, b"")
    if kind is None:  # packed, several elements in a byte: named, but not read
        bits = DTYPES[code][0]
        data = bytes(8 * bits // 8)
        file = raw.pack({"w": raw.entry(code, [2, 4], 0, len(data))}, data)
        (path / "model.safetensors").write_bytes(file)
        with Checkpoint.open(path) as checkpoint:
            assert checkpoint.tensors["w"].dtype.startswith("float")
            with pytest.raises(BadCheckpoint, match=f"packed dtype {code}") as caught:
                checkpoint.read("w")
            assert str(path / "model.safetensors") == caught.value.where
        return
    byte = torch.arange(1, 2 * 3 * kind.itemsize + 1, dtype=torch.uint8)
    tensor = (byte % 2 if code == "BOOL" else byte).view(TORCH[code]).reshape(2, 3)
    save_torch({"w": tensor}, path / "model.safetensors")
    with Checkpoint.open(path) as checkpoint:
        info = checkpoint.tensors["w"]
        assert (info.shape, info.dtype, info.file) == (
            (2, 3),
            dtype_name(code),
            "model.safetensors",
        )
        assert str(info) == f"w [2, 3] {info.dtype}"
        got = checkpoint.read("w")
    assert got.shape == (2, 3) and got.dtype == kind and not got.flags.writeable
    assert got.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_shapes_scalars_and_empty_tensors(tmp_path: Path) -> None:
    arrays = {
        "scalar": np.array(3.5, "f4"),
        "empty": np.zeros((0, 7), "f4"),
        "one": np.ones((1, 1, 1), "f2"),
        "odd": np.arange(5, dtype="i1"),
        "after": raw.f32(3),
    }
    save_file(arrays, raw.directory(tmp_path, b"") / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(arrays)
        for name, array in arrays.items():
            got = checkpoint.read(name)
            assert got.shape == array.shape and got.dtype == array.dtype
            np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("shards", [0, 1, 3])
@pytest.mark.parametrize("dtype", small.DTYPES)
def test_sharded_and_single(tmp_path: Path, shards: int, dtype: str) -> None:
    arrays = small.tensors(dtype)
    path = small.write(tmp_path, small.config(dtype), arrays, shards)
    with Checkpoint.open(str(path)) as checkpoint:
        assert checkpoint.path == path and checkpoint.config == small.config(dtype)
        assert dict(checkpoint.tensors).keys() == arrays.keys()
        assert len({t.file for t in checkpoint.tensors.values()}) == max(shards, 1)
        for name, array in arrays.items():
            assert checkpoint.read(name).tobytes() == array.tobytes()
        checkpoint.release()
        checkpoint.verify_unchanged()
        for name, array in arrays.items():  # after release the pages come back
            assert checkpoint.read(name).tobytes() == array.tobytes()


def test_an_index_that_names_the_single_file(tmp_path: Path) -> None:
    path = small.write(tmp_path)
    table = {name: "model.safetensors" for name in small.tensors()}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with Checkpoint.open(path) as checkpoint:
        assert len(checkpoint.tensors) == len(table)


def test_names_under(tmp_path: Path) -> None:
    names = ["a", "a.b", "a.b.c", "a.b\u3042", "b"]
    save_file({n: raw.f32(1) for n in names}, raw.directory(tmp_path, b"") / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        for prefix in ("", "a", "a.", "a.b", "a.b.", "b", "c", "a.b.c"):
            expected = sorted(n for n in names if n.startswith(prefix))
            assert checkpoint.names_under(prefix) == expected


def test_the_digest_depends_on_config_and_headers_only(tmp_path: Path) -> None:
    def digest(name: str, fields: Any, arrays: Any, shards: int = 0) -> dict[str, str]:
        with Checkpoint.open(small.write(tmp_path / name, fields, arrays, shards)) as checkpoint:
            return checkpoint.digest()

    base = digest("a", None, small.tensors())
    assert digest("b", None, small.tensors(seed=1)) == base
    assert digest("c", None, small.tensors(), 3) == base
    other = digest("d", small.config(norm_topk_prob=False), small.tensors())
    assert other["config_sha256"] != base["config_sha256"]
    assert other["tensors_sha256"] == base["tensors_sha256"]
    arrays = small.tensors()
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype("f2")
    assert digest("e", None, arrays)["tensors_sha256"] != base["tensors_sha256"]


def test_links_of_a_hugging_face_cache(tmp_path: Path) -> None:
    """models--x/snapshots/REVISION/name -> ../../blobs/DIGEST, as the hub's cache has it."""
    real = small.write(tmp_path / "real", shards=2)
    blobs = tmp_path / "hub" / "models--x--y" / "blobs"
    snapshot = blobs.parent / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(real.iterdir())):
        os.rename(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:064x}"))
    with Checkpoint.open(snapshot) as checkpoint:
        assert checkpoint.read("model.norm.weight").shape == (small.H,)
    (tmp_path / "by-link").symlink_to(snapshot)
    with Checkpoint.open(tmp_path / "by-link") as checkpoint:
        assert checkpoint.read("model.norm.weight").shape == (small.H,)


def test_views_outlive_the_checkpoint(tmp_path: Path) -> None:
    arrays = small.tensors()
    checkpoint = Checkpoint.open(small.write(tmp_path))
    view = checkpoint.read("model.norm.weight")
    checkpoint.close()
    checkpoint.close()
    np.testing.assert_array_equal(view, arrays["model.norm.weight"])
    with pytest.raises(BadCheckpoint, match="the checkpoint is closed"):
        checkpoint.read("model.norm.weight")


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def swap(path: Path) -> None:
    data = path.read_bytes()
    other = path.with_name("other")
    other.write_bytes(data)
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


CHANGES = {"rewritten": rewrite, "replaced": swap, "shrunk": shrink, "gone": os.unlink}


@pytest.mark.parametrize("when", ["before the first read", "after it"])
@pytest.mark.parametrize("how", CHANGES)
def test_files_that_change_meanwhile(tmp_path: Path, how: str, when: str) -> None:
    path = small.write(tmp_path)
    file = path / "model.safetensors"
    os.utime(file, ns=(0, 1_000_000_000_000_000_000))  # a rewrite must show in the time
    with Checkpoint.open(path) as checkpoint:
        if when == "after it":
            checkpoint.read("model.norm.weight")
        CHANGES[how](file)
        with pytest.raises(BadCheckpoint) as caught:
            checkpoint.read("model.norm.weight")
        assert caught.value.message == "model.safetensors changed while it was in use"
        assert caught.value.where == str(file)
        assert caught.value.need and "start again" in caught.value.hint
        if when == "after it":
            with pytest.raises(BadCheckpoint, match="changed while it was in use"):
                checkpoint.verify_unchanged()


def test_eight_threads(tmp_path: Path) -> None:
    arrays = small.tensors("bfloat16")
    path = small.write(tmp_path, small.config("bfloat16"), arrays, shards=5)
    wrong: list[str] = []
    with Checkpoint.open(path) as checkpoint:
        start = threading.Barrier(8)

        def work() -> None:
            start.wait()
            for name, array in arrays.items():
                if checkpoint.read(name).tobytes() != array.tobytes():
                    wrong.append(name)
                checkpoint.release()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_only_headers_are_read_when_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small.write(tmp_path)
    count = 0
    pread = os.pread

    def counting(fd: int, size: int, offset: int) -> bytes:
        nonlocal count
        count += size
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", counting)
    with Checkpoint.open(path):
        header = json.dumps(raw.split((path / "model.safetensors").read_bytes())[0])
        config = (path / "config.json").stat().st_size
        assert count <= config + 8 + 2 * len(header)
        if sys.platform == "linux":
            assert str(path) not in Path("/proc/self/maps").read_text()


def test_bfloat16_is_the_type_of_ml_dtypes(tmp_path: Path) -> None:
    path = small.write(tmp_path, small.config("bfloat16"), small.tensors("bfloat16"))
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.read("model.norm.weight").dtype == np.dtype(ml_dtypes.bfloat16)
