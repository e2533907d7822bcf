"""Calling blocks: every function, kind of tensor, T, schedule and output."""

from __future__ import annotations

import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import tvm_ffi

import moec.runtime
from moec.artifact import Verify
from moec.errors import TargetError, UsageError
from moec.runtime import Block, Model
from moec.runtime.call import Call
from moec.runtime.libraries import open_library
from tests.runtime import fake

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def model() -> Model:
    return moec.runtime.load(fake.shared())


@pytest.fixture(scope="module")
def block(model: Model) -> Block:
    return model[3]


@pytest.fixture(scope="module")
def half() -> Block:
    """The block whose x and y are bfloat16 and which copies x."""
    return moec.runtime.load(fake.shared("bfloat16"))[1]


def inputs(tokens: int, low: int = 0, high: int = fake.E) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(tokens)
    x = random.normal(size=(tokens, fake.H)).astype("f4")
    ids = random.integers(low, high, (tokens, fake.K)).astype("i4")
    return x, ids, random.random((tokens, fake.K)).astype("f4")


def test_a_library_is_never_loaded_unhashed() -> None:
    for level in ("manifest", Verify.MANIFEST):
        with pytest.raises(UsageError, match="never loaded unhashed"):
            moec.runtime.load(fake.shared(), verify=level)
    assert moec.runtime.load(fake.shared(), verify="library").layers == (1, 3)


def test_model(model: Model) -> None:
    assert model.layers == (1, 3) and list(model) == [1, 3] and len(model) == 2
    assert 3 in model and 2 not in model
    assert model.target == "cpu-fake"
    assert model[3].layer == 3
    assert model[3].spec == fake.spec("float32")
    assert "layers [1, 3]" in repr(model) and "E=4 K=2 H=8 I=3" in repr(model[3])


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 33, 257])
def test_numpy(block: Block, tokens: int) -> None:
    x, ids, weights = inputs(tokens, -2, fake.E + 2)
    y = block.experts(x, ids, weights)
    assert (type(y), y.dtype, y.shape) == (np.ndarray, np.float32, (tokens, fake.H))
    np.testing.assert_allclose(y, fake.experts(x, ids, weights), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(block(x), 2 * x)
    got, scores = block.route(x)
    assert (got.dtype, scores.dtype) == (np.int32, np.float32)
    order = np.arange(tokens)[:, None] + np.arange(fake.K)
    np.testing.assert_array_equal(got, order % fake.E)
    np.testing.assert_array_equal(scores, x[:, : fake.K] + np.arange(fake.K, dtype="f4"))


@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
def test_torch(block: Block, tokens: int) -> None:
    arrays = inputs(tokens, -2, fake.E + 2)
    x, ids, weights = (torch.from_numpy(a) for a in arrays)
    y = block.experts(x, ids, weights)
    assert (type(y), y.dtype, tuple(y.shape)) == (torch.Tensor, torch.float32, (tokens, fake.H))
    np.testing.assert_array_equal(y.numpy(), block.experts(*arrays))
    got, scores = block.route(x)
    assert (got.dtype, scores.dtype) == (torch.int32, torch.float32)
    torch.testing.assert_close(block(x), 2 * x)


@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_bfloat16_without_a_copy(half: Block, tokens: int) -> None:
    x = np.random.default_rng(0).normal(size=(tokens, fake.H)).astype(BF16)
    y = half(x)
    assert y.dtype == BF16
    np.testing.assert_array_equal(y.view("u2"), x.view("u2"))
    tensor = torch.from_numpy(x.view("i2")).view(torch.bfloat16)
    result = half(tensor)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result.view(torch.int16), tensor.view(torch.int16))
    exported = tvm_ffi.from_dlpack(tensor)
    third = half(exported)
    assert isinstance(third, tvm_ffi.Tensor) and str(third.dtype) == "bfloat16"
    assert torch.equal(torch.from_dlpack(third).view(torch.int16), tensor.view(torch.int16))


def test_plain_tensors_go_the_short_way(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short way that refuses all would give the same results, in twice the time."""
    x, ids, weights = inputs(5)
    want, args = block.experts(x, ids, weights), list(map(torch.from_numpy, (x, ids, weights)))
    monkeypatch.setattr(Call, "__call__", None)
    np.testing.assert_array_equal(block.experts(*args).numpy(), want)
    out = torch.empty_like(args[0])
    assert block.experts(*args, out=out) is out
    np.testing.assert_array_equal(out.numpy(), want)
    np.testing.assert_array_equal(block.experts(x, ids, weights), want)
    assert [tuple(made.shape) for made in block.route(args[0])] == [(5, fake.K)] * 2


def test_a_library_without_these_functions_goes_the_long_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = moec.runtime.load(fake.shared())[1]
    arrays = inputs(5)
    want = fake.experts(*arrays)
    monkeypatch.setattr(own._calls["experts"]._library, "entries", None)
    for args in (arrays, list(map(torch.from_numpy, arrays))):
        np.testing.assert_allclose(np.asarray(own.experts(*args)), want, rtol=1e-5, atol=1e-5)


def test_first_calls_of_many_threads_at_a_time() -> None:
    block, many = moec.runtime.load(fake.shared("bfloat16"))[1], 16
    x = torch.from_numpy(inputs(3)[0]).bfloat16()
    start = threading.Barrier(many)

    def call(_: int) -> bool:
        start.wait()
        return torch.equal(block(x), x)

    with ThreadPoolExecutor(many) as pool:
        assert all(pool.map(call, range(many)))


def test_an_artifact_in_the_place_of_a_loaded_one(tmp_path: Path) -> None:
    """Both models run the code that they were loaded with."""
    path, x = tmp_path / "model.moec", np.ones((2, fake.H), "f4")
    shutil.copytree(fake.shared(), path)
    first = moec.runtime.load(path)
    shutil.rmtree(path)
    shutil.copytree(fake.shared("bfloat16"), path)
    second = moec.runtime.load(path)
    np.testing.assert_array_equal(second[1](x.astype(BF16)), x.astype(BF16))
    np.testing.assert_array_equal(first[1](x), 2 * x)


def test_an_artifact_that_is_loaded_again(tmp_path: Path) -> None:
    """Its library is loaded once: code with two modules dies with the first (on GPUs)."""
    library = next((fake.shared() / "lib").iterdir())
    assert open_library(library) is open_library(library.parent / "." / library.name)
    copy = tmp_path / library.name
    shutil.copy(library, copy)
    assert open_library(copy) is not open_library(library)


class Foreign:
    """A tensor of a library that follows the array API standard and DLPack, old or new."""

    def __init__(self, array: Any, versioned: bool) -> None:
        self.array, self.versioned = array, versioned

    def __array_namespace__(self) -> Any:
        return self

    def from_dlpack(self, tensor: Any) -> Foreign:
        return Foreign(np.from_dlpack(tensor), self.versioned)

    def __dlpack__(self, **kwargs: Any) -> Any:
        if not self.versioned and kwargs:
            raise TypeError("no keywords")
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


@pytest.mark.parametrize("versioned", [False, True])
def test_other_libraries_get_their_own_kind_back(block: Block, versioned: bool) -> None:
    x, ids, weights = inputs(5)
    result = block.experts(*(Foreign(a, versioned) for a in (x, ids.astype("i8"), weights)))
    assert isinstance(result, Foreign)
    np.testing.assert_array_equal(result.array, block.experts(x, ids, weights))
    out = np.empty_like(x)
    assert block(Foreign(x, versioned), out=out) is out
    np.testing.assert_array_equal(out, 2 * x)


def test_results_outlive_everything_else() -> None:
    y = moec.runtime.load(fake.shared("bfloat16"))[1](
        tvm_ffi.from_dlpack(torch.ones(4, fake.H, dtype=torch.bfloat16))
    )
    assert torch.from_dlpack(y).float().sum() == 4 * fake.H


def test_kinds_may_be_mixed(block: Block) -> None:
    x, ids, weights = inputs(6)
    y = block.experts(torch.from_numpy(x), ids, tvm_ffi.from_dlpack(weights))
    assert isinstance(y, torch.Tensor)
    np.testing.assert_array_equal(y.numpy(), block.experts(x, ids, weights))


def test_unaligned_and_read_only_inputs(block: Block) -> None:
    x, ids, weights = inputs(5)
    raw = np.zeros(x.nbytes + 64, np.uint8)
    start = -raw.__array_interface__["data"][0] % 64 + 4
    crooked = raw[start : start + x.nbytes].view("f4").reshape(x.shape)
    crooked[:] = x
    crooked.flags.writeable = False
    out = raw[start:][: x.nbytes].view("f4").reshape(x.shape).copy()
    np.testing.assert_array_equal(block.experts(crooked, ids, weights, out), out)
    np.testing.assert_array_equal(out, block.experts(x, ids, weights))


def test_out(block: Block) -> None:
    x, ids, weights = inputs(5)
    for out in (np.empty_like(x), torch.empty(5, fake.H), tvm_ffi.from_dlpack(np.empty_like(x))):
        assert block.experts(x, ids, weights, out) is out
        np.testing.assert_array_equal(np.from_dlpack(out), block.experts(x, ids, weights))
    pair = np.empty((10, fake.H), "f4")
    pair[:5] = x
    block(pair[:5], pair[5:])  # neighbours do not overlap
    np.testing.assert_array_equal(pair[5:], 2 * x)
    empty = np.empty((0, fake.H), "f4")
    assert block(empty, empty) is empty


def test_int64_ids_are_converted_and_stay_out_of_range(block: Block) -> None:
    x, ids, weights = inputs(4)
    wide = ids.astype("i8")
    wide[0, 0], wide[1, 1], wide[2, 0] = 1 << 32, -(1 << 40), (1 << 63) - 1
    ids[0, 0] = ids[1, 1] = ids[2, 0] = -1
    expected = block.experts(x, ids, weights)
    np.testing.assert_array_equal(block.experts(x, wide, weights), expected)
    y = block.experts(torch.from_numpy(x), torch.from_numpy(wide), torch.from_numpy(weights))
    np.testing.assert_array_equal(y.numpy(), expected)


def test_schedules(block: Block) -> None:
    x, ids, weights = inputs(3)
    assert block.schedules("experts") == ("fused", "loop")
    assert block.schedules() == ("fused",)
    y = block.experts(x, ids, weights)
    np.testing.assert_array_equal(block.experts(x, ids, weights, schedule="fused"), y)
    loop = block.experts(x, ids, weights, schedule="loop")
    np.testing.assert_allclose(loop, y + 1000, rtol=1e-6)
    for tokens in (3, 0):
        with pytest.raises(TargetError, match="not compiled with schedule 'gather'") as caught:
            block.experts(*inputs(tokens), schedule="gather")
        assert "fused, loop" in str(caught.value)


def test_a_named_schedule_runs_outside_of_its_range(block: Block) -> None:
    x, ids, weights = inputs(100001)
    y = block.experts(x, ids, weights, schedule="fused")
    np.testing.assert_allclose(y, fake.experts(x, ids, weights), rtol=1e-4, atol=1e-5)


def test_threads_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    assert moec.runtime.load(fake.shared()).threads == 3
    assert moec.runtime.load(fake.shared(), threads=1).threads == 1
    monkeypatch.setenv("TVM_NUM_THREADS", "many")
    with pytest.raises(UsageError, match="TVM_NUM_THREADS is 'many'"):
        moec.runtime.load(fake.shared())


def test_threads_change_no_bit() -> None:
    x, ids, weights = inputs(33)
    results = [
        moec.runtime.load(fake.shared(), threads=n)[1].experts(x, ids, weights)
        for n in (1, 2, 3, 16)
    ]
    for y in results[1:]:
        np.testing.assert_array_equal(y, results[0])


def test_gradients_are_fine_where_none_are_recorded(block: Block) -> None:
    x = torch.ones(2, fake.H, requires_grad=True)
    with torch.no_grad():
        assert block(x).sum() == 4 * fake.H


def test_the_address_of_an_array_is_right() -> None:
    tensors = sys.modules["moec.runtime.tensors"]
    array = np.arange(20)[3:]
    assert tensors.address(array) == array.__array_interface__["data"][0]
    assert tensors._slow_address(array) == tensors.address(array)
