"""Wrong arguments of a call: an InputError that names the argument, never a crash."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import moec.runtime
from moec.errors import InputError, MoecError, TargetError, UsageError
from moec.runtime import Block, Model
from tests.runtime import fake

X = np.zeros((3, fake.H), "f4")
IDS = np.zeros((3, fake.K), "i4")
W = np.zeros((3, fake.K), "f4")
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def model() -> Model:
    return moec.runtime.load(fake.shared())


@pytest.fixture(scope="module")
def half() -> Block:
    return moec.runtime.load(fake.shared("bfloat16"))[1]


def crooked() -> np.ndarray:
    """X one byte off the alignment of its elements."""
    return np.zeros(X.nbytes + 1, np.uint8)[1:].view("f4").reshape(X.shape)


def read_only() -> np.ndarray:
    array = X.copy()
    array.flags.writeable = False
    return array


def swapped() -> np.ndarray:
    return X.astype(">f4")


def sparse() -> torch.Tensor:
    return torch.from_numpy(X).to_sparse()


def nested() -> torch.Tensor:
    with warnings.catch_warnings():  # torch calls them a prototype
        warnings.simplefilter("ignore", UserWarning)
        return torch.nested.nested_tensor([torch.from_numpy(X), torch.from_numpy(X[:2])])


def negated() -> torch.Tensor:
    return torch._neg_view(torch.from_numpy(X))  # contiguous, its values are not its bytes


class Broken:
    def __dlpack__(self, **_: Any) -> Any:
        raise RuntimeError("no export today")


class NoCapsule:
    def __dlpack__(self, **_: Any) -> Any:
        return 7


ROWS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "list": (lambda: [[1.0]], "x is of type list, not a tensor", "NumPy array"),
    "None": (lambda: None, "x is of type NoneType", "NumPy array"),
    "rank 1": (lambda: X[0], "x has shape [8]", "[T, 8] float32"),
    "rank 0": (lambda: np.float32(1) + np.zeros((), "f4"), "x", "float32"),
    "rank 3": (lambda: X[None], "x has shape [1, 3, 8]", "[T, 8] float32"),
    "width": (lambda: X[:, :7].copy(), "x has shape [3, 7]", "[T, 8] float32"),
    "float64": (lambda: X.astype("f8"), "x has dtype float64", "numpy.float32"),
    "float16": (lambda: X.astype("f2"), "x has dtype float16", "torch.float32"),
    "bfloat16": (lambda: X.astype(BF16), "x has dtype bfloat16", "numpy.float32"),
    "object": (lambda: X.astype(object), "x has dtype object", "numpy.float32"),
    "byte order": (swapped, "x has dtype float32 in foreign byte order", "numpy.float32"),
    "columns": (lambda: np.asfortranarray(X), "x is not C-contiguous", "ascontiguousarray"),
    "steps": (lambda: np.zeros((6, 8), "f4")[::2], "x is not C-contiguous", "ascontiguousarray"),
    "broadcast": (lambda: np.broadcast_to(X[:1], (3, 8)), "x is not C-contiguous", "contiguous"),
    "crooked": (crooked, "no multiple of its 4 byte elements", "x.copy()"),
    "torch float64": (lambda: torch.zeros(3, 8).double(), "x has dtype float64", "torch.float32"),
    "torch width": (lambda: torch.zeros(3, 9), "x has shape [3, 9]", "[T, 8] float32"),
    "torch steps": (lambda: torch.zeros(8, 3).T, "x is not C-contiguous (strides (1, 3))", "x.con"),
    "torch sparse": (sparse, "x is a sparse_coo tensor", "to_dense"),
    "torch nested": (nested, "x is a nested tensor", "unbind"),
    "torch negated": (negated, "x is not C-contiguous", "contiguous"),
    "torch meta": (lambda: torch.zeros(3, 8, device="meta"), "x is on device meta", "cpu"),
    "torch grad": (lambda: torch.zeros(3, 8, requires_grad=True), "requires a gradient", "no_grad"),
    "broken": (Broken, "x does not export its memory: no export today", "__dlpack__"),
    "no capsule": (NoCapsule, "x exports no DLPack capsule", "DLPack"),
}


@pytest.mark.parametrize("row", ROWS)
def test_x(model: Model, row: str) -> None:
    make, message, advice = ROWS[row]
    for call in (model[1], model[1].route, lambda x: model[1].experts(x, IDS, W)):
        with pytest.raises(InputError) as caught:
            call(make())
        assert message in caught.value.message and advice in str(caught.value)
        assert caught.value.where == "x" and caught.value.exit_code == 3


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "ids float": ({"topk_ids": W}, "topk_ids has dtype float32"),
    "ids uint32": ({"topk_ids": IDS.astype("u4")}, "topk_ids has dtype uint32"),
    "ids int16": ({"topk_ids": IDS.astype("i2")}, "topk_ids has dtype int16"),
    "ids width": ({"topk_ids": np.zeros((3, 3), "i4")}, "topk_ids has shape [3, 3]"),
    "ids rows": ({"topk_ids": IDS[:2]}, "topk_ids has 2 rows, x has 3"),
    "ids empty": ({"topk_ids": IDS[:0]}, "topk_ids has 0 rows, x has 3"),
    "ids int64 steps": (
        {"topk_ids": np.zeros((3, 4), "i8")[:, ::2]},
        "topk_ids is not C-contiguous",
    ),
    "weights float64": ({"topk_weights": W.astype("f8")}, "topk_weights has dtype float64"),
    "weights bfloat16": ({"topk_weights": W.astype(BF16)}, "topk_weights has dtype bfloat16"),
    "weights rows": ({"topk_weights": np.zeros((4, 2), "f4")}, "topk_weights has 4 rows, x has 3"),
    "out rows": ({"out": np.zeros((4, 8), "f4")}, "out has 4 rows, x has 3"),
    "out width": ({"out": np.zeros((3, 9), "f4")}, "out has shape [3, 9]"),
    "out dtype": ({"out": np.zeros((3, 8), "f8")}, "out has dtype float64"),
    "out read-only": ({"out": read_only()}, "out is read-only"),
    "out crooked": ({"out": crooked()}, "out starts at an address"),
    "out columns": ({"out": np.zeros((3, 8), "f4", order="F")}, "out is not C-contiguous"),
    "out list": ({"out": []}, "out is of type list"),
    "out torch grad": ({"out": torch.zeros(3, 8, requires_grad=True)}, "out requires a gradient"),
    "out is x": ({"out": X}, "out overlaps x in memory"),
}


@pytest.mark.parametrize("row", OTHERS)
def test_other_arguments(model: Model, row: str) -> None:
    changes, message = OTHERS[row]
    with pytest.raises(InputError) as caught:
        model[1].experts(**{"x": X, "topk_ids": IDS, "topk_weights": W, **changes})
    assert message in caught.value.message
    assert caught.value.where == next(iter(changes))
    assert caught.value.need


def test_out_may_not_touch_any_input(model: Model) -> None:
    memory = np.zeros(3 * 8 + 4, "f4")
    out = memory[4:].reshape(3, 8)
    for changes in (
        {"x": memory[:-4].reshape(3, 8)},
        {"topk_weights": memory[:6].reshape(3, 2)},
        {"topk_ids": memory[22:].view("i4").reshape(3, 2)},
    ):
        with pytest.raises(InputError, match=f"out overlaps {next(iter(changes))}"):
            model[1].experts(**{"x": X, "topk_ids": IDS, "topk_weights": W, **changes}, out=out)


def test_bits_of_bfloat16_are_asked_to_be_named(half: Block) -> None:
    for bits in (X.astype(BF16).view("u2"), X.astype(BF16).view("V2")):
        with pytest.raises(InputError) as caught:
            half(bits)
        assert "view(ml_dtypes.bfloat16)" in str(caught.value)
    with pytest.raises(InputError, match="x has dtype float32") as caught:
        half(torch.from_numpy(X))
    assert "x.to(torch.bfloat16)" in str(caught.value)


def test_ids_are_checked_on_request(model: Model) -> None:
    block = model[1]
    for bad in (-1, fake.E, 1 << 40):
        for kind in (np.asarray, torch.from_numpy):
            ids = np.zeros((3, 2), "i8")
            ids[1, 1] = bad
            with pytest.raises(InputError, match=f"topk_ids holds {bad}") as caught:
                block.experts(X, kind(ids), W, check_ids=True)
            assert "ids in [0, 4)" in str(caught.value)
    block.experts(X, IDS, W, check_ids=True)
    block.experts(X[:0], IDS[:0], W[:0], check_ids=True)
    with pytest.raises(InputError, match="has dtype float32"):
        block.experts(X, W, W, check_ids=True)


def test_too_many_tokens(model: Model) -> None:
    x, ids, w = (
        np.zeros((100000, 8), "f4"),
        np.zeros((100000, 2), "i4"),
        np.zeros((100000, 2), "f4"),
    )
    with pytest.raises(InputError, match="x has T = 100000 rows") as caught:
        model[1].experts(x, ids, w)
    assert "T in [0, 100000)" in str(caught.value)


def test_rows_are_counted_in_32_bits(model: Model) -> None:
    x = np.lib.stride_tricks.as_strided(np.zeros(8, "f4"), (1 << 30, 8), (0, 0))
    with pytest.raises(InputError):  # not contiguous, and T * K overflows
        model[1](x)


def test_layers_and_functions(model: Model) -> None:
    for layer in (2, -1, "1", None):
        with pytest.raises(InputError, match="is not in the artifact") as caught:
            model[layer]  # type: ignore[index]
        assert "1, 3" in str(caught.value)
    with pytest.raises(TargetError, match="no function 'gate'"):
        model[1].schedules("gate")


LOADS: dict[str, tuple[dict[str, Any], type[MoecError], str]] = {
    "cuda": ({"device": "cuda:0"}, TargetError, "cpu-fake (device cpu)"),
    "metal": ({"device": "metal"}, TargetError, "cannot run on device metal"),
    "no device": ({"device": ""}, UsageError, "is no device"),
    "device type": ({"device": 0}, UsageError, "is no device"),
    "device index": ({"device": "cpu:x"}, UsageError, "is no device"),
    "threads 0": ({"threads": 0}, UsageError, "1 to 4096"),
    "threads huge": ({"threads": 1 << 20}, UsageError, "1 to 4096"),
    "threads float": ({"threads": 2.0}, UsageError, "not an integer"),
    "threads bool": ({"threads": True}, UsageError, "not an integer"),
    "verify": ({"verify": "no"}, UsageError, "full, library, manifest"),
}


@pytest.mark.parametrize("row", LOADS)
def test_load(row: str) -> None:
    arguments, kind, message = LOADS[row]
    with pytest.raises(kind) as caught:
        moec.runtime.load(fake.shared(), **arguments)
    assert message in str(caught.value)
