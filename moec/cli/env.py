"""`moec env`: versions and hardware, to paste into a report."""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
from typing import Any

from .. import __version__, host
from ..errors import TargetError
from ..text import size
from .console import Console

_PACKAGES = (
    "apache-tvm",
    "apache-tvm-ffi",
    "numpy",
    "ml_dtypes",
    "safetensors",
    "onnx",
    "torch",
    "transformers",
)
# Of the hundred flags of a CPU, those that a kernel may use.
_TELLING = re.compile(r"(avx|amx|asimd|sve|sme\d?$|bf16|i8mm|fma$|f16c|bmi2|sse4_2).*")


def run(args: argparse.Namespace, console: Console) -> int:
    """Print the environment; 0 even when it is not fit for use, which it says."""
    facts = collect()
    if args.json:
        console.json(facts)
    else:
        width = max(map(len, facts))
        for key, value in facts.items():
            text = " ".join(value) if isinstance(value, list) else str(value)
            console.data(f"{key.ljust(width)}  {text}")
    return 0


def collect() -> dict[str, Any]:
    """Facts by name."""
    machine = host.host()
    facts: dict[str, Any] = {"moec": __version__}
    facts.update({name: host.installed(name) or "-" for name in _PACKAGES})
    facts["packages"] = _packages()
    facts["python"] = f"{platform.python_version()} ({platform.python_implementation()})"
    facts["system"] = f"{machine.os} {machine.arch} {platform.release()}"
    facts["cpu"] = machine.cpu
    facts["features"] = sorted(f for f in machine.features if _TELLING.match(f))
    facts["cores"] = machine.cores
    facts["memory"] = f"{size(machine.memory_total)}, {size(machine.memory_available)} available"
    facts["compiler"] = _compiler()
    return facts


def _packages() -> str:
    try:
        host.check_packages()
    except TargetError as error:
        return f"{error.message}; {error.hint}"
    return "ok, the pair that moec is built for"


def _compiler() -> str:
    for name in ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path:
            try:
                run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=9)
            except (OSError, subprocess.SubprocessError):
                continue
            return f"{path}: {run.stdout.strip().splitlines()[0] if run.stdout else '?'}"
    return "none found: 'moec compile' needs cc, gcc or clang to link"
