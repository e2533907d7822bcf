"""What this machine is and which pinned packages it has, found without importing TVM.

`host()` reads /proc, cgroups or sysctl once. Feature names are those of /proc/cpuinfo on
Linux; macOS names are translated to them, so that an artifact's requirements have one
vocabulary: os "linux" | "macos" | ..., arch "x86_64" | "aarch64" | ...
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import TargetError, UsageError

# With any other tvm-ffi, TVM 0.27 crashes in common paths, so nothing else is let through.
PINNED = {
    "apache-tvm": ("0.27.0.post1",),
    "apache-tvm-ffi": ("0.1.14.post0", "0.1.14.post1"),
}

MOST_THREADS = 4096  # that a call may be split into
_THREADS = "TVM_NUM_THREADS"

_ARCH = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
_OS = {"darwin": "macos"}
# What macOS calls an Arm feature, and what Linux calls it.
_ARM_FEATURES = {
    "AdvSIMD": "asimd",
    "FEAT_FP16": "asimdhp",
    "FEAT_DotProd": "asimddp",
    "FEAT_BF16": "bf16",
    "FEAT_I8MM": "i8mm",
    "FEAT_LSE": "atomics",
    "FEAT_SME": "sme",
    "FEAT_SME2": "sme2",
}


@dataclass(frozen=True)
class Host:
    """This machine: `cores` are those that this process may use, memory is in bytes."""

    os: str
    arch: str
    cpu: str
    features: frozenset[str]
    cores: int
    memory_total: int
    memory_available: int


@functools.cache
def host() -> Host:
    """The machine that runs this process; read once and kept."""
    system = platform.system().lower()
    machine = platform.machine().lower()
    name, features = _cpu_macos() if system == "darwin" else _cpu_linux()
    total, available = memory()
    return Host(
        os=_OS.get(system, system),
        arch=_ARCH.get(machine, machine),
        cpu=name,
        features=features,
        cores=cores(),
        memory_total=total,
        memory_available=available,
    )


def missing(requires: Mapping[str, Any], machine: Host | None = None) -> str | None:
    """Why `machine` (default: this one) cannot run code that needs `requires`, or None.

    `requires` has "os", "arch" and "features" as an artifact's manifest writes them; a key
    that is not known is a reason, because what it asks for cannot be checked. "gpu" is for
    whoever opens the device.
    """
    here = machine or host()
    unknown = sorted(set(requires) - {"os", "arch", "features", "gpu"})
    if unknown:
        return f"requirement {unknown[0]!r} is not known to this version of moec"
    for key, value in (("os", here.os), ("arch", here.arch)):
        if key in requires and requires[key] != value:
            return f"needs {key} {requires[key]}, this machine is {value}"
    lacking = sorted(set(requires.get("features", ())) - here.features)
    if lacking:
        return f"this CPU ({here.cpu}) lacks {', '.join(lacking)}"
    return None


def installed(package: str) -> str | None:
    """The installed version of `package` from its metadata, or None; imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def check_packages() -> None:
    """Raise TargetError unless TVM and its FFI are the pair that moec is built for."""
    for package, good in PINNED.items():
        found = installed(package)
        if found not in good:
            state = "is not installed" if found is None else f"is {found}"
            pins = " ".join(f"{name}=={versions[0]}" for name, versions in PINNED.items())
            raise TargetError(
                f"{package} {state}, and moec works with {good[0]} only",
                where="this Python environment",
                need=pins,
                hint=f"pip install {pins}",
            )


def same_release(a: str, b: str | None) -> bool:
    """Whether two versions differ in their post-release number at most."""
    return b is not None and a.split(".post")[0] == b.split(".post")[0]


def cores() -> int:
    """Cores that this process may use: the affinity mask, cut by the cgroup's CPU quota."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = _cgroup_cpus()
    return max(1, min(count, math.ceil(quota))) if quota else count


def threads() -> int:
    """Threads of a call by default: the variable that TVM's own pool reads, else the cores.

    Raises UsageError for a TVM_NUM_THREADS that is no number from 1 to MOST_THREADS.
    """
    text = os.environ.get(_THREADS, "").strip()
    if not text:
        return cores()
    # Python refuses to read numbers of thousands of digits.
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= MOST_THREADS:
        raise UsageError(
            f"the environment variable {_THREADS} is {text!r}",
            where=_THREADS,
            need=f"a number from 1 to {MOST_THREADS}",
            hint=f"unset {_THREADS} to use the cores of the process",
        )
    return int(text)


def memory() -> tuple[int, int]:
    """Total and available bytes for this process, cut by the cgroup's memory limit."""
    if platform.system() == "Darwin":
        total = int(_sysctl().get("hw.memsize", 0))
        return total, total
    table = {}
    for line in _read("/proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        number = value.split()
        if number and number[0].isdigit():
            table[key] = int(number[0]) * 1024
    total = table.get("MemTotal", 0)
    available = table.get("MemAvailable", total)
    for folder in _cgroups():
        limit = _read(folder / "memory.max").strip()
        if limit.isdigit() and int(limit) < total:
            used = _read(folder / "memory.current").strip()
            total = int(limit)
            available = min(available, total - int(used or 0) + _reclaimable(folder))
    return total, max(0, available)


def _reclaimable(folder: Path) -> int:
    """Page cache that the kernel drops before it refuses memory to this group."""
    for line in _read(folder / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == "inactive_file":
            return int(value)
    return 0


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _cgroups() -> list[Path]:
    """The cgroup v2 folders from this process's group up to the root."""
    root = Path("/sys/fs/cgroup")
    for line in _read("/proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            folder = root / line[3:].strip().lstrip("/")
            inside = [p for p in (folder, *folder.parents) if p.is_relative_to(root)]
            return [p for p in inside if p.is_dir()]
    return []


def _cgroup_cpus() -> float | None:
    limits = []
    for folder in _cgroups():
        parts = _read(folder / "cpu.max").split()
        if len(parts) == 2 and parts[0].isdigit():
            limits.append(int(parts[0]) / int(parts[1]))
    quota = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip()
    period = _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
    if quota.isdigit() and period.isdigit():  # version 1; no limit is -1
        limits.append(int(quota) / int(period))
    return min(limits) if limits else None


def _cpu_linux() -> tuple[str, frozenset[str]]:
    name, features = platform.processor() or platform.machine(), frozenset[str]()
    # The first processor's block is enough: the kernel reports what all cores share.
    for line in _read("/proc/cpuinfo").split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            features = frozenset(value.split())
        elif key.strip() == "model name":
            name = value.strip()
    return name, features


@functools.cache
def _sysctl() -> dict[str, str]:
    keys = ["machdep.cpu", "hw.memsize", "hw.optional"]
    try:
        run = subprocess.run(["sysctl", *keys], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return {}
    pairs = (line.partition(":") for line in run.stdout.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu_macos() -> tuple[str, frozenset[str]]:
    table = _sysctl()
    found = {_ARM_FEATURES.get(key.rsplit(".", 1)[-1], "") for key in table if table[key] == "1"}
    for key in ("machdep.cpu.features", "machdep.cpu.leaf7_features"):
        found |= {_x86_name(word) for word in table.get(key, "").split()}
    return table.get("machdep.cpu.brand_string", platform.machine()), frozenset(found - {""})


def _x86_name(word: str) -> str:
    plain = word.lower().replace(".", "_")
    return {"avx1_0": "avx"}.get(plain, plain)
