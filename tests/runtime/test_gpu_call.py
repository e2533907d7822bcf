"""The short way of a call on a GPU, without one: torch tensors of the CPU stand for the device's.

Only what a call decides on the host is tested: which tensors take the short way, and what the
compiled function is then given; it refuses what does not fit, here as on a GPU. Refusals are
explained by the long way, which tests/gpu calls.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moec.artifact import Function, TensorType, Variant
from moec.errors import TargetError
from moec.runtime import gpu_call, gpu_tensors
from moec.runtime.call import Prepared
from moec.spec import ExpertsSpec

H, K = 32, 4
FUNCTION = Function(
    (TensorType("x", ("T", H), "bfloat16"), TensorType("topk_ids", ("T", K), "int32"),
     TensorType("topk_weights", ("T", K), "float32")),
    (), (TensorType("y", ("T", H), "bfloat16"),),
    tuple(Variant(f"s{n}", name, span, (1000, 100), True, {})
          for n, (name, span) in enumerate([("gather", (0, 8)), ("stream16", (8, None))])),
)  # fmt: skip


class Fake(gpu_call.GpuCall):
    """Notes what the compiled function would be called with."""

    def __init__(self) -> None:
        super().__init__("experts", FUNCTION, None, dict, ExpertsSpec(16, K, H, 32), -1)  # type: ignore[arg-type]
        self.seen: list[dict[str, Any]] = []
        self.taken: list[tuple[int, int, bool]] = []  # size, stream, whether it was given back
        self.error: Exception | None = None

    def _ready(self, index: int) -> Any:
        def called(*args: Any) -> None:
            if self.error:
                raise self.error
            tensors, rest = args[: len(FUNCTION.inputs) + 1], args[len(FUNCTION.inputs) + 1 :]
            ports = FUNCTION.inputs + FUNCTION.outputs
            tokens = tensors[0].shape[0]
            for port, tensor in zip(ports, tensors, strict=True):
                if tensor.shape != (tokens, *port.shape[1:]) or not tensor.is_contiguous():
                    raise ValueError("shape")
                if tensor.dtype is not getattr(torch, port.dtype) or tensor.is_meta:
                    raise TypeError("dtype")
            seen = {"index": index, "ready": ready, "lengths": lengths}
            self.seen.append({**seen, "tensors": tensors, "rest": rest})

        lengths = [[0], [0], [0]]  # of two shapes, and of the workspace
        places = [SimpleNamespace(data=0) for _ in range(len(FUNCTION.inputs) + 2)]
        frame: Any = SimpleNamespace(call=None, tensors=places)
        ready = Prepared(frame, (len(FUNCTION.inputs), 1), lengths, FUNCTION.variants[index])
        ready.native = called, (), ("workspace", 1)
        return ready


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Fake:
    class Kind(gpu_tensors._Torch):
        def __init__(self, module: Any, index: int) -> None:
            super().__init__(module, 0)
            self.device = torch.device("cpu")

        def take(self, size: int, stream: int) -> tuple[Any, int]:
            made.taken.append((size, stream, False))
            return self.empty((size,), "uint8")

        def give(self, held: Any) -> None:
            made.taken[-1] = (*made.taken[-1][:2], True)

        def stream(self) -> int:
            return 7

    monkeypatch.setattr(gpu_tensors, "_Torch", Kind)
    monkeypatch.setattr(gpu_tensors, "_torch", {})
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    made = Fake()
    return made


def tensors(tokens: int = 5) -> list[Any]:
    return [
        torch.randn(tokens, H).bfloat16(),
        torch.zeros(tokens, K, dtype=torch.int32),
        torch.ones(tokens, K),
    ]


@pytest.mark.parametrize(("tokens", "index"), [(1, 0), (7, 0), (8, 1), (300, 1)])
@pytest.mark.parametrize("given", [False, True])
def test_what_fits_is_passed_on(call: Fake, tokens: int, index: int, given: bool) -> None:
    args = tensors(tokens)
    out = torch.empty_like(args[0]) if given else None
    (y,) = call._short(torch, args, out, None) or [None]
    assert y is out if given else (y.shape, y.dtype) == ((tokens, H), torch.bfloat16)
    (seen,) = call.seen
    ready = seen["ready"]
    assert seen["index"] == index
    assert seen["lengths"] == [[tokens], [tokens], [1000 + 100 * tokens]]
    assert all(a is b for a, b in zip(seen["tensors"], [*args, y], strict=True))
    assert seen["rest"] == ("workspace", 1)
    assert ready.space.data and ready.space.data % 256 == 0
    assert call.taken == [(ready.size + 256, 7, True)]


def test_memory_is_given_back_after_a_failure(call: Fake) -> None:
    call.error = TargetError("no stream")
    with pytest.raises(TargetError):
        call._short(torch, tensors(), None, None)
    assert [given for _, _, given in call.taken] == [True]


def test_a_named_schedule_is_used(call: Fake) -> None:
    assert call._short(torch, tensors(), None, "stream16") is not None
    assert call.seen[0]["index"] == 1


class Derived(torch.Tensor):
    """A tensor whose class may mean anything by its attributes."""


def unusual() -> dict[str, tuple[list[Any], Any]]:
    x, ids, weights = tensors()
    backing = torch.empty(6 * H).bfloat16()
    grown = torch.zeros(4 + 5 * K)
    with warnings.catch_warnings():  # torch calls them a prototype
        warnings.simplefilter("ignore", UserWarning)
        nested = torch.nested.nested_tensor([x, x[:2]])
    return {
        "no tokens": (tensors(0), None),
        "another dtype": ([x.float(), ids, weights], None),
        "int64 ids": ([x, ids.long(), weights], None),
        "another width": ([x[:, :16].contiguous(), ids, weights], None),
        "another token count": ([x, ids[:4], weights], None),
        "another rank": ([x[0], ids, weights], None),
        "not contiguous": ([torch.randn(H, 5).bfloat16().T, ids, weights], None),
        "not aligned": ([x, ids, grown[1 : 1 + 5 * K].view(5, K)], None),
        "nested": ([nested, ids, weights], None),
        "sparse": ([x, ids, weights.to_sparse()], None),
        "a negated view": ([x, ids, torch._neg_view(weights)], None),
        "for autograd": ([x, ids, weights.clone().requires_grad_()], None),
        "a class of its own": ([x.as_subclass(Derived), ids, weights], None),
        "no tensor": ([x.float().numpy(), ids, weights], None),
        "another device": ([x, ids, weights.to("meta")], None),
        "out of another dtype": ([x, ids, weights], torch.empty(5, H)),
        "out of another length": ([x, ids, weights], torch.empty(4, H).bfloat16()),
        "out over an input": (
            [backing[: 5 * H].view(5, H), ids, weights], backing[H:].view(5, H)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", unusual())
def test_what_is_unusual_goes_the_long_way(call: Fake, name: str) -> None:
    args, out = unusual()[name]
    assert call._short(torch, args, out, None) is None and not call.seen


def test_another_current_device_goes_the_long_way(
    call: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    assert call._short(torch, tensors(), None, None) is None


def test_a_torch_without_a_c_interface_goes_the_long_way(
    call: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = next(c for c in torch.Tensor.__mro__ if "__dlpack_c_exchange_api__" in c.__dict__)
    monkeypatch.delattr(owner, "__dlpack_c_exchange_api__")
    assert call._short(torch, tensors(), None, None) is None and not call.seen
