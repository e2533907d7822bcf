"""Random damage: a MoecError or the very same tensors, never another exception.

The oracle for single files is the safetensors library: what moec takes, it takes too, and
both see the same names, dtypes, shapes and bytes.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from moec.checkpoint import Checkpoint
from moec.checkpoint.header import DTYPES, dtype_name
from moec.errors import MoecError
from moec.frontend import outline
from tests.checkpoint import raw
from tests.frontend import small

CODES = {dtype_name(code): code for code in DTYPES}


def quick(examples: int) -> settings:
    checks = [HealthCheck.function_scoped_fixture]  # every example writes its files anew
    return settings(max_examples=examples, deadline=None, suppress_health_check=checks)


# Bytes that keep JSON alive are as likely as any others.
BYTE = st.one_of(st.sampled_from(b'0123456789"{}[],:.-+eE\\ u'), st.integers(0, 255))
EDIT = st.tuples(st.sampled_from(["set", "insert", "delete", "cut"]), st.floats(0, 1), BYTE)


def damaged(data: bytes, edits: list[tuple[str, float, int]], reach: int) -> bytes:
    """`data` with the edits made one after another, at places within the first `reach` bytes."""
    out = bytearray(data)
    for kind, place, byte in edits:
        if not reach:
            break
        at = min(int(place * reach), reach - 1)
        if kind == "set":
            out[at] = byte
        elif kind == "insert":
            out.insert(at, byte)
            reach += 1
        elif kind == "delete":
            del out[at]
            reach -= 1
        elif kind == "cut" and byte < 16:  # rarely: it leaves little else to find
            del out[at:]
            reach = at
    return bytes(out)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@functools.cache
def single() -> bytes:
    arrays = {"a": raw.f32(2, 3), "b": raw.f32(4).astype("f2"), "c.d": np.zeros((0, 3), "i1")}
    return save(arrays, {"format": "pt"})


@quick(300)
@given(edits=st.lists(EDIT, min_size=1, max_size=4), everywhere=st.booleans())
def test_one_file_against_the_library(
    folder: Path, edits: list[tuple[str, float, int]], everywhere: bool
) -> None:
    whole = single()
    head = 8 + int.from_bytes(whole[:8], "little")
    data = damaged(whole, edits, len(whole) if everywhere else head)
    agrees_with_the_library(folder, data)


NUMBER = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 24, 32, 1 << 31, 1 << 63, 1 << 64, 1.0, True, None])
FIELD = st.one_of(
    st.tuples(st.just("dtype"), st.sampled_from([*DTYPES, "f32", "F7", None, 3])),
    st.tuples(st.just("shape"), st.lists(NUMBER, max_size=3)),
    st.tuples(st.just("data_offsets"), st.lists(NUMBER, min_size=1, max_size=3)),
    st.tuples(st.sampled_from(["extra", "shape "]), NUMBER),
)


@quick(300)
@given(
    changes=st.lists(st.tuples(st.sampled_from(["a", "b", "c.d", "new"]), FIELD), max_size=3),
    renamed=st.sampled_from(["a", "", "c", "__metadata__", "x\0", "../a", "é"]),
)
def test_header_fields_against_the_library(
    folder: Path, changes: list[tuple[str, tuple[str, Any]]], renamed: str
) -> None:
    header, data = raw.split(single())
    for name, (field, value) in changes:
        header.setdefault(name, {})[field] = value
    header[renamed] = header.pop("a")
    agrees_with_the_library(folder, raw.pack(header, data))


def agrees_with_the_library(folder: Path, data: bytes) -> None:
    """moec refuses the file with a MoecError, or sees in it what the library sees."""
    raw.directory(folder, data)
    try:
        with Checkpoint.open(folder) as checkpoint:
            seen = {
                t.name: (CODES[t.dtype], list(t.shape), checkpoint.read(t.name).tobytes())
                for t in checkpoint.tensors.values()
            }
    except MoecError as error:
        assert error.where and error.need and error.hint
        return
    try:
        library = dict(deserialize(data))
    except SafetensorError as error:
        raise AssertionError(f"moec takes what the library refuses: {error}") from None
    assert seen == {n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in library.items()}


@functools.cache
def original() -> tuple[dict[str, bytes], dict[tuple[int, str], bytes]]:
    """The files of a sharded model, and its canonical tensors by layer and name."""
    with tempfile.TemporaryDirectory() as name:
        path = small.write(Path(name), shards=2)
        return {f.name: f.read_bytes() for f in sorted(path.iterdir())}, read(path)


def read(path: Path) -> dict[tuple[int, str], bytes]:
    with Checkpoint.open(path) as checkpoint:
        model = outline(checkpoint)
        for block in model.blocks:
            block.plan.check(checkpoint)
        return {
            (block.layer, name): block.plan.tensor(checkpoint, name).tobytes()
            for block in model.blocks
            for name, _ in block.plan.params
        }


@quick(300)
@given(
    edits=st.lists(st.tuples(st.integers(0, 3), EDIT), min_size=1, max_size=3),
)
def test_a_model_with_damaged_config_index_and_headers(
    folder: Path, edits: list[tuple[int, Any]]
) -> None:
    files, expected = original()
    shutil.rmtree(folder / "m", ignore_errors=True)
    (folder / "m").mkdir()
    for number, (name, data) in enumerate(files.items()):
        head = 8 + int.from_bytes(data[:8], "little") if name.endswith("safetensors") else len(data)
        mine = [edit for chosen, edit in edits if chosen == number]
        (folder / "m" / name).write_bytes(damaged(data, mine, head))
    try:
        got = read(folder / "m")
    except MoecError as error:
        assert error.where and error.need and error.hint and error.exit_code == 3
        return
    # A config may name fewer layers; whatever is read of a layer is what was written.
    assert got and got.items() <= expected.items()


@quick(100)
@given(text=st.text(max_size=40), data=st.binary(max_size=60))
def test_anything_as_config_or_weights(folder: Path, text: str, data: bytes) -> None:
    for config, weights in ((text, single()), ("{}", data), (text, data)):
        raw.directory(folder, weights)
        (folder / "config.json").write_bytes(config.encode("utf-8", "surrogatepass"))
        try:
            with Checkpoint.open(folder) as checkpoint:
                outline(checkpoint)
        except MoecError as error:
            assert error.where and error.need and error.hint


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@quick(150)
@given(field=st.sampled_from(sorted(small.CONFIG)), value=JSON)
def test_any_value_of_any_field(folder: Path, field: str, value: Any) -> None:
    path = folder / "m"
    if not path.exists():
        small.write(path)
    import json

    (path / "config.json").write_text(json.dumps(small.config(**{field: value})))
    try:
        got = read(path)
    except MoecError as error:
        assert error.where and error.need and error.hint
        return
    assert got and got.items() <= original()[1].items()
