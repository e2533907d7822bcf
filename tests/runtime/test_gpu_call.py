"""The short way of a call on a GPU, without one: torch tensors of the CPU stand for the device's.

The library is that of the hand-written artifact, so the C code of a call is the one that every
library has. Only what a call decides on the host is tested. Refusals are explained by the long
way, which tests/gpu calls.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from moec.artifact import Function, TensorType, Variant
from moec.runtime import abi, gpu_call
from moec.runtime import tensors as tensors_of
from moec.runtime.call import Call
from moec.runtime.libraries import open_library
from moec.runtime.native import Device
from moec.runtime.tensors import address
from tests.runtime import fake

H, K = fake.H, fake.K
ROUTED = TensorType("topk_ids", ("T", K), "int32"), TensorType("topk_weights", ("T", K), "float32")
X, Y = TensorType("x", ("T", H), "float32"), TensorType("y", ("T", H), "float32")
FUNCTION = Function(
    (X, *ROUTED), ("gate_up", "down"), (Y,),
    (Variant("b0_experts", "gather", (0, 8), (1000, 100), True, {}),
     Variant("b0_experts_loop", "loop", (8, None), (1000, 100), True, {})),
)  # fmt: skip
ROUTE = Function((X,), (), ROUTED, (Variant("b0_route", "fused", (0, None), (8, 0), True, {}),))


_INT, _U64, _POINTER = ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p
_PLACE = ctypes.POINTER(ctypes.c_void_p)


class Machine:
    """The functions of a device, and what they were called with."""

    def __init__(self) -> None:
        self.current, self.memory, self.full = 0, 1 << 20, False
        self.streams: list[tuple[int, int, int | None]] = []
        self.sizes: list[int] = []
        self.released: list[int] = []
        self._space = ctypes.create_string_buffer(self.memory)
        self._functions = (
            ctypes.CFUNCTYPE(_INT, ctypes.POINTER(_INT))(self._get_device),
            ctypes.CFUNCTYPE(_INT, _INT, _INT, _POINTER, _PLACE)(self._set_stream),
            ctypes.CFUNCTYPE(_INT, _U64, _PLACE)(self._allocate),
            ctypes.CFUNCTYPE(_INT, _POINTER)(self._release),
        )
        self.device = Device(*(ctypes.cast(f, _POINTER) for f in self._functions))

    def _get_device(self, place: Any) -> int:
        place[0] = self.current
        return 0

    def _set_stream(self, kind: int, index: int, stream: int | None, before: Any) -> int:
        self.streams.append((kind, index, stream))
        if before:
            before[0] = 99
        return 0

    def _allocate(self, size: int, place: Any) -> int:
        self.sizes.append(size)
        place[0] = self.start = ctypes.addressof(self._space) + 8
        return int(self.full)

    def _release(self, place: int) -> int:
        self.released.append(place)
        return 0


class OnCpu(gpu_call.GpuCall):
    """A call of a device whose memory is the CPU's."""

    def __init__(self, machine: Machine, function: Function = FUNCTION) -> None:
        library, spec = open_library(fake.shared_library()), fake.spec("float32").experts
        self.keep = fake.weights("float32")
        self.keep["gate_up"] = np.ascontiguousarray(self.keep["gate_up"].transpose(0, 2, 1))
        super().__init__("experts", function, library, lambda: self.keep, spec, 0)  # type: ignore[arg-type,return-value]
        self.machine = machine

    def short(self, args: list[Any], out: Any = None, schedule: str | None = None) -> Any:
        """What the short way makes of a call: the result, or None."""
        if not self._takes(type(args[0])):
            return None
        done = self._short(args, out, schedule)
        return done and (done[0] if len(done) == 1 else done)

    def _place(self) -> Device:
        return self.machine.device

    def _kind_of(self, torch: Any) -> Any:
        return tensors_of.torch_kind(torch)

    def _tensor(self, shape: Any, dtype: str, data: int = 0) -> abi.DLTensor:
        return Call._tensor(self, shape, dtype, data)

    def _parameter(self, name: str, bound: Mapping[str, Any]) -> int:
        return address(bound[name])


@pytest.fixture
def call() -> OnCpu:
    return OnCpu(Machine())


def tensors(tokens: int = 5) -> list[Any]:
    ids = torch.randint(0, fake.E, (tokens, K), dtype=torch.int32)
    return [torch.randn(tokens, H), ids, torch.rand(tokens, K)]


def expected(args: list[Any], plus: float) -> Any:
    return fake.experts(*(a.numpy() for a in args)) + np.float32(plus)


@pytest.mark.parametrize("given", [False, True])
def test_what_fits_is_run(call: OnCpu, given: bool) -> None:
    machine = call.machine
    for tokens in (1, 7, 8, 300, 8, 1, 1):
        args = tensors(tokens)
        out = torch.empty_like(args[0]) if given else None
        y = call.short(args, out)
        assert y is out if given else (y.shape, y.dtype) == ((tokens, H), torch.float32)
        plus = 1000 if tokens >= 8 else 0
        np.testing.assert_allclose(y.numpy(), expected(args, plus), rtol=1e-5, atol=1e-5)
        native = call._frames.last
        assert native is not None and native.ready.space.data % 256 == 0
        assert machine.sizes[-1] == 1000 + 100 * tokens + 256
        assert 0 <= native.ready.space.data - machine.start < 256
        assert machine.released == [machine.start] * len(machine.sizes)
        # torch's stream of the CPU is none
        assert machine.streams[-2:] == [(1, 0, None), (1, 0, 99)]


def test_two_results() -> None:
    route, x = OnCpu(Machine(), ROUTE), torch.randn(5, H)
    ids, weights = route.short([x])
    order = np.arange(5)[:, None] + np.arange(K)
    np.testing.assert_array_equal(ids.numpy(), order % fake.E)
    np.testing.assert_array_equal(weights.numpy(), x[:, :K].numpy() + np.arange(K, dtype="f4"))


def test_memory_is_given_back_after_a_failure(call: OnCpu) -> None:
    assert call.short(tensors()) is not None
    native = call._frames.last
    assert native is not None
    native.ready.frame.tensors[-1].ndim = 3  # the compiled function raises
    assert call.short(tensors()) is None
    assert len(call.machine.released) == len(call.machine.sizes) == 2
    assert call.machine.streams[-1] == (1, 0, 99)


def test_without_memory_it_goes_the_long_way(call: OnCpu) -> None:
    call.machine.full = True
    assert call.short(tensors()) is None
    assert not call.machine.released and call.machine.streams[-1] == (1, 0, 99)


def test_a_named_schedule_is_used(call: OnCpu) -> None:
    args = tensors()
    for name, plus in (("loop", 1000), (None, 0), ("gather", 0), ("loop", 1000)):
        y = call.short(args, None, name)
        np.testing.assert_allclose(y.numpy(), expected(args, plus), rtol=1e-5, atol=1e-5)


class Derived(torch.Tensor):
    """A tensor whose class may mean anything by its attributes."""


def unusual() -> dict[str, tuple[list[Any], Any]]:
    x, ids, weights = tensors()
    backing = torch.empty(6 * H)
    grown = torch.zeros(4 + 5 * K)
    with warnings.catch_warnings():  # torch calls them a prototype
        warnings.simplefilter("ignore", UserWarning)
        nested = torch.nested.nested_tensor([x, x[:2]])
    return {
        "no tokens": (tensors(0), None),
        "another dtype": ([x.half(), ids, weights], None),
        "int64 ids": ([x, ids.long(), weights], None),
        "another width": ([x[:, :4].contiguous(), ids, weights], None),
        "another token count": ([x, ids[:4], weights], None),
        "another rank": ([x[0], ids, weights], None),
        "not contiguous": ([torch.randn(H, 5).T, ids, weights], None),
        "not aligned": ([x, ids, grown[1 : 1 + 5 * K].view(5, K)], None),
        "nested": ([nested, ids, weights], None),
        "sparse": ([x, ids, weights.to_sparse()], None),
        "a negated view": ([x, ids, torch._neg_view(weights)], None),
        "for autograd": ([x, ids, weights.clone().requires_grad_()], None),
        "a class of its own": ([x.as_subclass(Derived), ids, weights], None),
        "no tensor": ([x.numpy(), ids, weights], None),
        "another device": ([x, ids, weights.to("meta")], None),
        "out of another dtype": ([x, ids, weights], torch.empty(5, H).half()),
        "out of another length": ([x, ids, weights], torch.empty(4, H)),
        "out over an input": (
            [backing[: 5 * H].view(5, H), ids, weights], backing[H:].view(5, H)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("before", [None, 5, 4])
@pytest.mark.parametrize("name", unusual())
def test_what_is_unusual_goes_the_long_way(call: OnCpu, name: str, before: int | None) -> None:
    args, out = unusual()[name]
    if before:
        assert call.short(tensors(before)) is not None
    assert call.short(args, out) is None


def test_another_current_device_goes_the_long_way(call: OnCpu) -> None:
    call.machine.current = 1
    assert call.short(tensors()) is None
    assert not call.machine.sizes and not call.machine.streams


def test_a_torch_without_a_c_interface_goes_the_long_way(
    call: OnCpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = next(c for c in torch.Tensor.__mro__ if "__dlpack_c_exchange_api__" in c.__dict__)
    monkeypatch.delattr(owner, "__dlpack_c_exchange_api__")
    assert call.short(tensors()) is None
