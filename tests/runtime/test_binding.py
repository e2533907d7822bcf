"""Weights left in the checkpoint: packed when a layer is first used, only from the right one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import moec.runtime
from moec import host
from moec.artifact import ArtifactWriter, anonymous, mapped
from moec.checkpoint import Checkpoint
from moec.errors import ArtifactError, BadCheckpoint, CheckFailed, ResourceError, UsageError
from moec.runtime.tensors import address
from moec.weights import ParamPlan, Piece, WeightPlan
from tests.runtime import fake

LAYERS = (1, 3)


def plan(layer: int) -> WeightPlan:
    """gate_up from two tensors an expert, down from one stacked and transposed tensor."""
    half = (fake.I, fake.H)
    whole = tuple((0, n, 1) for n in half)
    down = (fake.E, fake.I, fake.H)
    gate_up = tuple(
        Piece(f"{layer}.{{e}}.{name}", half, (at, at + fake.I), whole, False)
        for name, at in (("gate", 0), ("up", fake.I))
    )
    index = ("e", (0, fake.I, 1), (0, fake.H, 1))
    stacked = Piece(f"{layer}.down", down, (0, fake.H), index, True)
    return WeightPlan(
        (
            ("gate_up", ParamPlan((fake.E, 2 * fake.I, fake.H), "float32", True, gate_up)),
            ("down", ParamPlan((fake.E, fake.H, fake.I), "float32", True, (stacked,))),
        ),
        tuple(f"{layer}." for _ in range(1)),
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    arrays = fake.weights("float32")
    tensors = {}
    for layer in LAYERS:
        tensors[f"{layer}.down"] = np.ascontiguousarray(arrays["down"].transpose(0, 2, 1))
        for e in range(fake.E):
            tensors[f"{layer}.{e}.gate"] = arrays["gate_up"][e, : fake.I].copy()
            tensors[f"{layer}.{e}.up"] = arrays["gate_up"][e, fake.I :].copy()
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "fake"}))
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture
def artifact(tmp_path: Path, checkpoint: Path) -> Path:
    path = tmp_path / "a.moec"
    with Checkpoint.open(checkpoint) as opened:
        digest = opened.digest()
    blocks = [
        {"layer": layer, "shape": "b0", "weights": None, "plan": plan(layer).to_json()}
        for layer in LAYERS
    ]
    document = fake.document(
        "float32",
        blocks=blocks,
        source={"family": "fake", **digest},
        weights={"mode": "reference", "target": None},
    )
    with ArtifactWriter(path) as writer:
        writer.add_file("lib/cpu-fake.so", fake.shared_library())
        writer.finish(document)
    return path


def test_reference_gives_the_same_bits(artifact: Path, checkpoint: Path) -> None:
    model = moec.runtime.load(artifact, checkpoint=checkpoint)
    packed = moec.runtime.load(fake.shared())
    random = np.random.default_rng(3)
    x = random.normal(size=(9, fake.H)).astype("f4")
    ids = random.integers(0, fake.E, (9, fake.K)).astype("i4")
    w = random.random((9, fake.K)).astype("f4")
    for layer in LAYERS:
        expected = packed[layer].experts(x, ids, w)
        np.testing.assert_array_equal(model[layer].experts(x, ids, w), expected)


def test_layers_are_packed_when_first_used(artifact: Path, checkpoint: Path) -> None:
    model = moec.runtime.load(artifact, checkpoint=checkpoint)
    x = np.ones((2, fake.H), "f4")
    assert (model[1](x) == 2).all()
    shutil.rmtree(checkpoint)
    ids, w = np.zeros((2, fake.K), "i4"), np.ones((2, fake.K), "f4")
    with pytest.raises(BadCheckpoint):
        model[3].experts(x, ids, w)


def test_a_missing_checkpoint_is_asked_for(artifact: Path) -> None:
    with pytest.raises(UsageError, match="they stay in the checkpoint") as caught:
        moec.runtime.load(artifact)
    assert "checkpoint=CHECKPOINT" in str(caught.value)


@pytest.mark.parametrize("part", ["config.json", "the tensors"])
def test_another_checkpoint_is_refused(artifact: Path, checkpoint: Path, part: str) -> None:
    if part == "config.json":
        (checkpoint / part).write_text('{"model_type": "other"}')
    else:
        safetensors.numpy.save_file({"w": np.ones(3, "f4")}, checkpoint / "model.safetensors")
    with pytest.raises(CheckFailed, match=f"not the one .* {part} differ") as caught:
        moec.runtime.load(artifact, checkpoint=checkpoint)
    assert caught.value.exit_code == 5


def test_memory_is_estimated_before_packing(
    artifact: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = moec.runtime.load(artifact, checkpoint=checkpoint)
    monkeypatch.setattr(host, "memory", lambda: (1 << 30, 100))
    ids, w = np.zeros((1, fake.K), "i4"), np.ones((1, fake.K), "f4")
    with pytest.raises(ResourceError, match="packing layer 1 needs"):
        model[1].experts(np.ones((1, fake.H), "f4"), ids, w)


def test_weights_packed_for_another_target(tmp_path: Path) -> None:
    path = fake.copied(tmp_path)

    def twice(targets: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
        away = {**targets["cpu-fake"], "requires": {"os": "plan9"}}
        return {"cpu-away": away, "cpu-fake": targets["cpu-fake"]}

    fake.edit(path, targets=twice, weights={"mode": "pack", "target": "cpu-away"})
    with pytest.raises(UsageError, match="packed for cpu-away, not for cpu-fake"):
        moec.runtime.load(path)


def test_copied_weights_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory.COPY: read when a layer is first used, and never again."""
    path = fake.copied(tmp_path)
    mapping, copying = moec.runtime.load(path), moec.runtime.load(path, memory="copy")
    random = np.random.default_rng(3)
    x = random.normal(size=(9, fake.H)).astype("f4")
    ids = random.integers(0, fake.E, (9, fake.K)).astype("i4")
    w = random.random((9, fake.K)).astype("f4")
    first, second = mapping.layers
    for _ in range(2):
        expected = mapping[first].experts(x, ids, w)
        np.testing.assert_array_equal(copying[first].experts(x, ids, w), expected)
        for file in path.rglob("*.safetensors"):
            file.unlink(missing_ok=True)
    with pytest.raises(ArtifactError):
        copying[second].experts(x, ids, w)
    with pytest.raises(UsageError, match="memory='disk' is unknown"):
        moec.runtime.load(fake.shared(), memory="disk")
    monkeypatch.setattr(host, "memory", lambda: (1 << 30, 100))
    with pytest.raises(ResourceError, match="copying layer 1 needs") as caught:
        moec.runtime.load(fake.shared(), memory="copy")[1].experts(x, ids, w)
    assert "memory='map'" in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how memory is mapped")
def test_large_parameters_may_be_on_huge_pages(tmp_path: Path) -> None:
    """Private memory that asks for them: shared anonymous memory, mmap's default, gets none."""
    file = tmp_path / "file"
    file.write_bytes(bytes(8 << 20))
    for array in (anonymous((8 << 20,), "uint8"), mapped(file)):
        flags = mapping_flags(address(array))
        assert "sh" not in flags and (not THP.exists() or "hg" in flags), flags
        assert not array.any()


THP = Path("/sys/kernel/mm/transparent_hugepage")


def mapping_flags(place: int) -> list[str]:
    """VmFlags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and ":" not in head:
            low, high = (int(end, 16) for end in head.split("-"))
            inside = low <= place < high
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no mapping holds the address")
