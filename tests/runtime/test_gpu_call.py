"""The short way of a call on a GPU, without one: torch tensors of the CPU stand for the device's.

Only what a call decides on the host is tested: which tensors take the short way, and what the
compiled function is then given. Refusals are those of the long way, which tests/gpu calls.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moec.artifact import Function, TensorType, Variant
from moec.runtime import cuda, gpu_call, gpu_tensors
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

    def _ready(self, index: int) -> Any:
        inputs = [SimpleNamespace(data=0) for _ in FUNCTION.inputs]
        ready = SimpleNamespace(
            inputs=inputs, outputs=[SimpleNamespace(data=0)], lengths=[[0], [0]], fixed=1000,
            per_token=100, space=SimpleNamespace(data=0), room=[0],
        )  # fmt: skip
        ready.call = lambda: self.seen.append({"index": index, **vars(ready)})
        return ready


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Fake:
    class Kind(gpu_tensors._Torch):
        def __init__(self, module: Any, index: int) -> None:
            super().__init__(module, 0)
            self.device = torch.device("cpu")

        def stream(self) -> int:
            return 7

    monkeypatch.setattr(gpu_tensors, "_Torch", Kind)
    monkeypatch.setattr(gpu_tensors, "_torch", {})
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(cuda, "use_stream", lambda device, stream: None)
    return Fake()


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
    assert seen["index"] == index and seen["lengths"] == [[tokens], [tokens]]
    assert [t.data for t in seen["inputs"]] == [a.data_ptr() for a in args]
    assert seen["outputs"][0].data == y.data_ptr()
    assert seen["room"] == [1000 + 100 * tokens] and seen["space"].data % 256 == 0


def test_a_named_schedule_is_used(call: Fake) -> None:
    assert call._short(torch, tensors(), None, "stream16") is not None
    assert call.seen[0]["index"] == 1


class Derived(torch.Tensor):
    """A tensor whose class may mean anything by its attributes."""


def unusual() -> dict[str, tuple[list[Any], Any]]:
    x, ids, weights = tensors()
    backing = torch.empty(6 * H).bfloat16()
    grown = torch.zeros(4 + 5 * K)
    return {
        "no tokens": (tensors(0), None),
        "another dtype": ([x.float(), ids, weights], None),
        "int64 ids": ([x, ids.long(), weights], None),
        "another width": ([x[:, :16].contiguous(), ids, weights], None),
        "another token count": ([x, ids[:4], weights], None),
        "another rank": ([x[0], ids, weights], None),
        "not contiguous": ([torch.randn(H, 5).bfloat16().T, ids, weights], None),
        "not aligned": ([x, ids, grown[1 : 1 + 5 * K].view(5, K)], None),
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
