"""Damaged or unfitting artifacts: each is refused with a MoecError before any code is loaded."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moec.runtime
from moec.artifact import Artifact
from moec.errors import ArtifactError, MoecError, TargetError, UsageError
from tests.runtime import fake
from tests.runtime.test_threads import run

Damage = Callable[[Path], None]
WEIGHTS = "weights/layer-00001.safetensors"


def at(*path: str | int, value: Any) -> Callable[[Any], Any]:
    """A change of a nested manifest value."""

    def change(node: Any) -> Any:
        inner = node
        for key in path[:-1]:
            inner = inner[key]
        if value is KeyError:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        return node

    return change


def manifest(**changes: Any) -> Damage:
    return lambda path: fake.edit(path, **changes)


def text(replace: str, by: str) -> Damage:
    def damage(path: Path) -> None:
        file = path / "manifest.json"
        old = file.read_text()
        assert replace in old
        file.write_text(old.replace(replace, by, 1))

    return damage


def file(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes())) and None


def link(path: Path) -> None:
    os.rename(path / WEIGHTS, path.parent / "outside")
    (path / WEIGHTS).symlink_to(path.parent / "outside")


def newer(path: Path) -> None:
    fake.edit(path, format_version=3, blocks="a form that this version does not know")


def weight_header(change: Callable[[dict[str, Any]], None]) -> Damage:
    """Change a weight file's header and the manifest with it, as a faulty writer would."""

    def damage(path: Path) -> None:
        import hashlib

        data = (path / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        head = json.dumps(header).encode().ljust(length)
        data = data[:8] + head + data[8 + length :]
        (path / WEIGHTS).write_bytes(data)
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        fake.edit(path, files=lambda files: {**files, WEIGHTS: entry})

    return damage


TARGET = ("cpu-fake", "shapes", "b0")
ROWS: dict[str, tuple[Damage, type[MoecError], str]] = {
    "cut library": (file("lib/cpu-fake.so", lambda b: b[:-1]), ArtifactError, "cpu-fake.so has"),
    "cut weights": (file(WEIGHTS, lambda b: b[: len(b) // 2]), ArtifactError, f"{WEIGHTS} has"),
    "missing file": (lambda p: (p / WEIGHTS).unlink(), ArtifactError, f"lacks file {WEIGHTS}"),
    "extra file": (
        lambda p: (p / "ir" / "new.py").write_text("") and None,
        ArtifactError,
        "unknown file ir/new.py",
    ),
    "link to outside": (link, ArtifactError, "neither a file nor a folder"),
    "fifo": (lambda p: os.mkfifo(p / "pipe"), ArtifactError, "pipe is neither"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), UsageError, "no artifact here"),
    "not JSON": (file("manifest.json", lambda b: b[:-9]), ArtifactError, "not valid JSON"),
    "not UTF-8": (file("manifest.json", lambda b: b"\xff" + b), ArtifactError, "not valid JSON"),
    "not an object": (file("manifest.json", lambda b: b"[]\n"), ArtifactError, "not an object"),
    "deep": (file("manifest.json", lambda b: b"[" * 99999), ArtifactError, "not valid JSON"),
    "twice a key": (text('"format": "moec"', '"format": "moec",\n "format": "moec"'),
                    ArtifactError, "a key occurs twice"),
    "NaN": (text('"bytes": 13', '"bytes": NaN'), ArtifactError, "NaN is no JSON"),
    "not canonical": (text('"format": "moec"', '"format":  "moec"'), ArtifactError, "canonical"),
    "digest": (text('"layer": 3', '"layer": 4'), ArtifactError, "digest"),
    "foreign": (manifest(format="other"), ArtifactError, "'other' is not 'moec'"),
    "newer version": (newer, ArtifactError, "format version 3"),
    "other tvm": (
        manifest(producer={"moec": "0", "tvm": "0.28.0", "tvm_ffi": "0.1.14.post0"}),
        ArtifactError,
        "made with apache-tvm 0.28.0",
    ),
    "other tvm_ffi": (
        manifest(producer={"moec": "0", "tvm": "0.27.0.post1", "tvm_ffi": "0.1.15"}),
        ArtifactError,
        "made with apache-tvm-ffi 0.1.15",
    ),
    "path up": (manifest(files=at("../x", value={"sha256": "0" * 64, "bytes": 0})),
                ArtifactError, "'../x' is not a plain relative path"),
    "path absolute": (manifest(files=at("/etc/passwd", value={"sha256": "0" * 64, "bytes": 0})),
                      ArtifactError, "'/etc/passwd' is not a plain"),
    "path hidden": (manifest(files=at("a/.b", value={"sha256": "0" * 64, "bytes": 0})),
                    ArtifactError, "is not a plain"),
    "path backslash": (manifest(files=at("a\\b", value={"sha256": "0" * 64, "bytes": 0})),
                       ArtifactError, "is not a plain"),
    "library not listed": (manifest(targets=at("cpu-fake", "library", value="lib/x.so")),
                           ArtifactError, "'lib/x.so' is not in files"),
    "weights not listed": (manifest(blocks=at(0, "weights", value="weights/x")),
                           ArtifactError, "'weights/x' is not in files"),
    "no such shape": (manifest(blocks=at(0, "shape", value="b9")), ArtifactError, "no shape 'b9'"),
    "layers not sorted": (manifest(blocks=at(0, "layer", value=3)), ArtifactError, "ascending"),
    "layer true": (manifest(blocks=at(0, "layer", value=True)), ArtifactError, "layer: True"),
    "spec": (manifest(shapes=at("b0", "spec", "experts", "top_k", value=99)),
             ArtifactError, "shapes.b0.spec"),
    "parameter shape": (manifest(shapes=at("b0", "parameters", "down", "shape", value=[4, 8, 4])),
                        ArtifactError, "not those that the spec asks for"),
    "packed source": (manifest(targets=at(*TARGET, "packed", "down", "source", value="up")),
                      ArtifactError, "'up' is not a parameter"),
    "packed experts": (
        manifest(targets=at(*TARGET, "packed", "gate_up", "shape", value=[5, 8, 6])),
        ArtifactError, "4 experts"),
    "packed shape": (manifest(targets=at(*TARGET, "packed", "down", "shape", value=[4, 8, 5])),
                     ArtifactError, "does not hold the parameters"),
    "unknown parameter": (
        manifest(targets=at(*TARGET, "functions", "moe", "parameters", value=["bias"])),
        ArtifactError, "takes 'bias'"),
    "no variants": (manifest(targets=at(*TARGET, "functions", "moe", "variants", value=[])),
                    ArtifactError, "moe.variants: there is none"),
    "empty range": (
        manifest(targets=at(*TARGET, "functions", "moe", "variants", 0, "tokens", value=[4, 4])),
        ArtifactError, "[4, 4) is empty"),
    "negative workspace": (
        manifest(targets=at(*TARGET, "functions", "moe", "variants", 0, "workspace",
                            value=[-1, 0])),
        ArtifactError, "-1 is not a dimension"),
    "dtype": (manifest(targets=at(*TARGET, "packed", "down", "dtype", value="float7")),
              ArtifactError, "'float7' is not a dtype"),
    "missing field": (manifest(targets=at("cpu-fake", "device", value=KeyError)),
                      ArtifactError, "targets.cpu-fake.device: it is missing"),
    "mode": (manifest(weights={"mode": "maybe", "target": None}), ArtifactError, "'maybe'"),
    "weights of no target": (manifest(weights={"mode": "pack", "target": "gone"}),
                             ArtifactError, "'gone' is not a target"),
    "sha256": (manifest(files=at(WEIGHTS, "sha256", value="0" * 63)), ArtifactError,
               "is not a sha256"),
    "weight header names": (weight_header(lambda h: h.update(lower=h.pop("down"))),
                            ArtifactError, "does not hold the parameters"),
    "weight header hole": (
        weight_header(lambda h: h["gate_up"].update(data_offsets=[64, 832])),
        ArtifactError, "'gate_up' is at byte"),
    "weight header shape": (weight_header(lambda h: h["down"].update(shape=[4, 8, 99])),
                            ArtifactError, "its header is malformed"),
    "weight header dtype": (weight_header(lambda h: h["down"].update(dtype="F7")),
                            ArtifactError, "its header is malformed"),
    "symbol": (
        manifest(targets=at(*TARGET, "functions", "moe", "variants", 0, "symbol", value="gone")),
        ArtifactError, "no function 'gone'"),
    "other machine": (manifest(targets=at("cpu-fake", "requires", value={"arch": "s390x"})),
                      TargetError, "this machine cannot run"),
    "missing feature": (
        manifest(targets=at("cpu-fake", "requires", value={"features": ["avx9"]})),
        TargetError, "this machine cannot run"),
    "unknown requirement": (manifest(targets=at("cpu-fake", "requires", value={"moon": 1})),
                            TargetError, "this machine cannot run"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_refused(tmp_path: Path, row: str) -> None:
    damage, kind, message = ROWS[row]
    path = fake.copied(tmp_path)
    damage(path)
    with pytest.raises(MoecError) as caught:
        model = moec.runtime.load(path)
        import numpy as np

        model[1](np.ones((1, fake.H), "f4"))  # symbols are looked up when first called
    error = caught.value
    assert type(error) is kind and message in error.message, str(error)
    assert error.need or error.hint
    assert error.exit_code == {ArtifactError: 5, TargetError: 4, UsageError: 2}[kind]
    assert str(path) in str(error) or "manifest.json" in str(error)


FLIP = """
import random, sys
from pathlib import Path
import moec.runtime
from moec.errors import ArtifactError
root = Path(sys.argv[1])
random.seed(7)
count = 0
for file in sorted(p for p in root.rglob("*") if p.is_file()):
    data = file.read_bytes()
    places = {0, len(data) - 1, *random.sample(range(len(data)), min(len(data), 40))}
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << random.randrange(8)
        file.write_bytes(bytes(changed))
        try:
            moec.runtime.load(root)
        except ArtifactError:
            count += 1
        else:
            raise SystemExit(f"{file} accepted with byte {place} flipped")
    file.write_bytes(data)
assert str(root) not in open("/proc/self/maps").read()
moec.runtime.load(root)
print(count)
"""


def test_one_flipped_byte_anywhere_is_refused_before_code_is_loaded(tmp_path: Path) -> None:
    path = fake.copied(tmp_path)
    assert int(run(FLIP, str(path))) > 150


def test_levels_of_checking(tmp_path: Path) -> None:
    path = fake.copied(tmp_path)
    file(WEIGHTS, lambda b: b[:-1] + bytes([b[-1] ^ 1]))(path)
    Artifact.open(path, verify="manifest")
    Artifact.open(path, verify="library")
    with pytest.raises(ArtifactError, match="sha256"):
        Artifact.open(path)
    with pytest.raises(UsageError, match="verify='some'") as caught:
        Artifact.open(path, verify="some")
    assert "full, library, manifest" in str(caught.value)
    (path / "ir" / "b0.py").write_bytes(b"# from people")
    with pytest.raises(ArtifactError, match="sha256"):
        Artifact.open(path, verify="library")


@pytest.mark.parametrize("what", ["nothing", "file", "folder"])
def test_no_artifact(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    if what == "file":
        path.write_text("")
    elif what == "folder":
        path.mkdir()
    with pytest.raises(UsageError, match="no artifact here"):
        moec.runtime.load(path)


def test_the_manifest_may_not_be_a_link(tmp_path: Path) -> None:
    path = fake.copied(tmp_path)
    os.rename(path / "manifest.json", tmp_path / "m")
    (path / "manifest.json").symlink_to(tmp_path / "m")
    with pytest.raises(ArtifactError, match="not a regular file"):
        Artifact.open(path)


def test_unknown_keys_are_for_later_versions(tmp_path: Path) -> None:
    path = fake.copied(tmp_path)
    fake.edit(path, later={"x": 1}, blocks=at(0, "note", value="hello"))
    moec.runtime.load(path)


def test_post_releases_fit(tmp_path: Path) -> None:
    path = fake.copied(tmp_path)
    fake.edit(path, producer={"moec": "9", "tvm": "0.27.0", "tvm_ffi": "0.1.14.post7"})
    moec.runtime.load(path)


def test_the_wrong_pair_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    from moec import host

    for found, words in (("0.1.15.post2", "is 0.1.15.post2"), (None, "is not installed")):
        host.check_packages.cache_clear()
        installed = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": found}
        monkeypatch.setattr(host, "installed", installed.get)
        with pytest.raises(TargetError) as caught:
            host.check_packages()
        assert caught.value.message.startswith(f"apache-tvm-ffi {words}")
        assert "pip install apache-tvm==0.27.0.post1" in str(caught.value)
        monkeypatch.undo()
    host.check_packages.cache_clear()
    host.check_packages()
