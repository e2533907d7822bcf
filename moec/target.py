"""The target of a compilation, resolved once from its name into a value.

Nobody parses a target string after `resolve`. Cross-compiling needs neither the device nor a
machine of that kind.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from . import host
from .errors import TargetError

# Known CPUs: name -> (architecture, instruction set of the kernels, in schedules/cpu/isa.py).
_X86, _ARM = "x86_64", "aarch64"
CPUS: dict[str, tuple[str, str]] = {
    "x86-64": (_X86, "sse2"),
    "x86-64-v3": (_X86, "avx2"),
    "haswell": (_X86, "avx2"),
    "znver3": (_X86, "avx2"),
    "x86-64-v4": (_X86, "avx512"),
    "skylake-avx512": (_X86, "avx512"),
    "icelake-server": (_X86, "avx512"),
    "sapphirerapids": (_X86, "avx512-bf16"),
    "znver4": (_X86, "avx512-bf16"),
    "aarch64": (_ARM, "neon"),
    "neoverse-n1": (_ARM, "neon"),
    "neoverse-v1": (_ARM, "neon-bf16"),
    "neoverse-n2": (_ARM, "neon-bf16"),
    "neoverse-v2": (_ARM, "neon-bf16"),
    "armv8.6-a": (_ARM, "neon-bf16"),
}
# What the host offers -> the target it gets, best first. Decided by CPU flags and not by the
# CPU's name: virtual machines often hide the name, and mask features the name implies.
_V3 = ("avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_HOST_X86 = (
    ((*_V4, "avx512_bf16"), "znver4"),
    (_V4, "x86-64-v4"),
    (_V3, "x86-64-v3"),
    ((), "x86-64"),
)
KINDS = ("cpu", "cuda", "metal")


class Form(str, enum.Enum):
    """How a GPU holds the weights of experts."""

    PLAIN = "plain"  # as the checkpoint has them
    COMPACT = "compact"  # bfloat16 in 12 bits, nothing lost
    BOTH = "both"  # twice, and every schedule reads the form that it is faster with

    @property
    def suffix(self) -> str:
        """What the name of a GPU architecture ends in."""
        return "" if self is Form.PLAIN else f"-{self.value}"


# GPU architectures that there are kernels for. sm_XY is machine code; compute_80 is PTX, which
# the driver of every later GPU translates when an artifact is loaded.
GPUS = (*(f"sm_90a{form.suffix}" for form in Form), "sm_89", "sm_80", "compute_80")


@dataclass(frozen=True)
class Target:
    """A resolved target. `name` is canonical ("cpu-znver4") and names files in an artifact."""

    name: str
    kind: str
    os: str
    arch: str
    isa: str
    form: Form = Form.PLAIN

    @property
    def triple(self) -> str:
        """LLVM's target triple."""
        if self.os == "macos":
            return f"{'arm64' if self.arch == _ARM else self.arch}-apple-macosx13.0"
        return f"{self.arch}-unknown-linux-gnu"

    @property
    def library(self) -> str:
        """The name of its library in an artifact."""
        return f"lib/{self.name}{'.dylib' if self.os == 'macos' else '.so'}"

    @property
    def runs_here(self) -> bool:
        """Whether this machine has the operating system and architecture of the target."""
        return (self.os, self.arch) == (host.host().os, host.host().arch)


def resolve(text: str) -> Target:
    """A Target from its name: "cpu" (this machine), "cpu:NAME", "cuda:ARCH", "metal".

    "cuda" alone is cuda:sm_90a.

    "metal" is any Mac with Apple silicon. "metal:emulated" has the same kernels and the host
    code of this machine: what the emulator in tools/ runs, for tests. Raises TargetError for
    a name that is none of these.
    """
    kind, _, name = text.strip().partition(":")
    if kind not in KINDS:
        raise TargetError(
            f"unknown target {text!r}",
            need="one of " + ", ".join(KINDS),
            hint="'moec targets' lists what can be compiled for",
        )
    if kind == "cuda":
        return _gpu(name or GPUS[0], text)
    if kind == "metal" and name in ("", "emulated"):
        return _metal(bool(name))
    if kind != "cpu":
        raise TargetError(
            f"target {text!r} is not supported by this version",
            need="cpu, cpu:NAME, metal, " + ", ".join(f"cuda:{name}" for name in GPUS),
            hint="'moec targets' lists what can be compiled for",
        )
    return _cpu(name or host_cpu(), text)


def _metal(emulated: bool) -> Target:
    here = host.host()
    if emulated:
        return Target("metal-emulated", "metal", here.os, here.arch, "")
    return Target("metal", "metal", "macos", _ARM, "")


def host_cpu() -> str:
    """The name in CPUS that fits this machine's instruction sets."""
    machine = host.host()
    if machine.arch == _ARM:
        return "armv8.6-a" if "bf16" in machine.features else "aarch64"
    return next(name for need, name in _HOST_X86 if machine.features.issuperset(need))


def _gpu(name: str, text: str) -> Target:
    if name not in GPUS:
        raise TargetError(
            f"unknown GPU architecture {name!r} in target {text!r}",
            need="one of " + ", ".join(GPUS),
            hint="sm_90a is the H100, the H200 and the GH200, sm_89 the L4, the L40 and the RTX "
            "40, sm_80 the A100 and all of its generation; compute_80 is PTX for these and newer; "
            "sm_90a-compact holds bfloat16 weights in 12 bits, sm_90a-both in 12 and in 16",
        )
    # Host code of a GPU library is for the machines that such GPUs are mostly found in.
    isa, _, form = name.partition("-")
    return Target(f"cuda-{name}", "cuda", "linux", _X86, isa, Form(form or Form.PLAIN))


def _cpu(name: str, text: str) -> Target:
    if name not in CPUS:
        raise TargetError(
            f"unknown CPU {name!r} in target {text!r}",
            need="one of " + ", ".join(sorted(CPUS)),
            hint="'cpu' alone compiles for this machine",
        )
    arch, isa = CPUS[name]
    here = host.host()
    system = "macos" if (here.os, here.arch) == ("macos", arch) else "linux"
    return Target(f"cpu-{name}", "cpu", system, arch, isa)
