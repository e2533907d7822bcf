"""What differs between devices when an artifact is loaded: opening one, and making its calls."""

from __future__ import annotations

from collections.abc import Callable

from ..artifact import Block as BlockEntry
from ..artifact import Function
from ..spec import ExpertsSpec
from . import cuda
from .binding import Binding
from .call import Call
from .cpu_call import CpuCall
from .gpu_binding import GpuBinding
from .gpu_call import GpuCall
from .libraries import Library
from .metal import MetalCall, MetalDevice

RUNNABLE = ("cpu", "cuda", "metal")
# (layer, name of the function, its description, the experts it runs) -> what callers call
MakeCall = Callable[[BlockEntry, str, Function, ExpertsSpec], Call]


def gpu_number(device: str) -> int | None:
    """The number of a CUDA device ("cuda" is the first), None for any other device."""
    kind, _, index = device.partition(":")
    return int(index or 0) if kind == "cuda" else None


def open_device(device: str) -> MetalDevice | None:
    """Make `device` ready; a library for it loads only where the device's runtime is.

    Raises TargetError when this machine or process has no such device.
    """
    kind, _, index = device.partition(":")
    if kind == "cuda":
        cuda.prepare()
    return MetalDevice(int(index or 0)) if kind == "metal" else None


def make_calls(
    device: str,
    metal: MetalDevice | None,
    library: Library,
    binding: Binding,
    threads: tuple[int, int],
) -> MakeCall:
    """How the functions of an artifact become calls on `device`."""
    gpu = gpu_number(device)
    if gpu is not None:
        memory = GpuBinding(binding, gpu)
        return lambda entry, name, function, spec: GpuCall(
            name, function, library, lambda: memory.parameters(entry), spec, gpu
        )
    if metal is not None:
        return lambda entry, name, function, spec: MetalCall(
            metal,
            entry.layer,
            name,
            function,
            library,
            lambda: binding.parameters(entry),
            spec,
            threads,
        )
    return lambda entry, name, function, spec: CpuCall(
        name, function, library, lambda: binding.parameters(entry), spec, threads
    )
