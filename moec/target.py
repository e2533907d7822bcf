"""The target of a compilation, resolved once from its name into a value.

Nobody parses a target string after `resolve`. Cross-compiling needs neither the device nor a
machine of that kind.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import host
from .errors import TargetError

# Known CPUs: name -> (architecture, LLVM's -mcpu, instruction set of the kernels).
# The instruction set names a value of schedules/cpu/isa.py.
_X86, _ARM = "x86_64", "aarch64"
CPUS: dict[str, tuple[str, str, str]] = {
    "x86-64": (_X86, "x86-64", "sse2"),
    "x86-64-v3": (_X86, "haswell", "avx2"),
    "haswell": (_X86, "haswell", "avx2"),
    "znver3": (_X86, "znver3", "avx2"),
    "skylake-avx512": (_X86, "skylake-avx512", "avx512"),
    "icelake-server": (_X86, "icelake-server", "avx512"),
    "sapphirerapids": (_X86, "sapphirerapids", "avx512-bf16"),
    "znver4": (_X86, "znver4", "avx512-bf16"),
    "aarch64": (_ARM, "generic", "neon"),
    "neoverse-n1": (_ARM, "neoverse-n1", "neon"),
    "neoverse-v1": (_ARM, "neoverse-v1", "neon"),
    "apple-m1": (_ARM, "apple-m1", "neon"),
}
# What the host offers -> the target it gets, best first. Decided by CPU flags and not by the
# CPU's name: virtual machines often hide the name, and mask features the name implies.
_HOST_X86 = (
    (("avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni"), "znver4"),
    (("avx512f", "avx512bw", "avx512dq", "avx512vl"), "skylake-avx512"),
    (("avx2", "fma", "f16c", "bmi2"), "x86-64-v3"),
    ((), "x86-64"),
)
KINDS = ("cpu", "cuda", "metal")


@dataclass(frozen=True)
class Target:
    """A resolved target. `name` is canonical ("cpu-znver4") and names files in an artifact."""

    name: str
    kind: str
    os: str
    arch: str
    mcpu: str
    isa: str

    @property
    def triple(self) -> str:
        """LLVM's target triple."""
        return f"{self.arch}-unknown-linux-gnu"

    @property
    def runs_here(self) -> bool:
        """Whether this machine has the operating system and architecture of the target."""
        return (self.os, self.arch) == (host.host().os, host.host().arch)


def resolve(text: str) -> Target:
    """A Target from its name: "cpu" (this machine), "cpu:NAME"; raises TargetError."""
    kind, _, name = text.strip().partition(":")
    if kind not in KINDS:
        raise TargetError(
            f"unknown target {text!r}",
            need="one of " + ", ".join(KINDS),
            hint="'moec targets' lists what can be compiled for",
        )
    if kind != "cpu":
        raise TargetError(
            f"target {text!r} is not supported by this version",
            need="cpu or cpu:NAME",
            hint="'moec targets' lists what can be compiled for",
        )
    return _cpu(name or host_cpu(), text)


def host_cpu() -> str:
    """The name in CPUS that fits this machine's instruction sets."""
    machine = host.host()
    if machine.arch == _ARM:
        return "apple-m1" if machine.os == "macos" else "aarch64"
    return next(name for need, name in _HOST_X86 if machine.features.issuperset(need))


def _cpu(name: str, text: str) -> Target:
    if name not in CPUS:
        raise TargetError(
            f"unknown CPU {name!r} in target {text!r}",
            need="one of " + ", ".join(sorted(CPUS)),
            hint="'cpu' alone compiles for this machine",
        )
    arch, mcpu, isa = CPUS[name]
    return Target(f"cpu-{name}", "cpu", "linux", arch, mcpu, isa)
