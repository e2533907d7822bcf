"""Runs Metal kernels on a CPU, for tests on machines without an Apple GPU.

Three tools, described in README.md:

- `lint`: clang's front end reads MSL as C++ for OpenCL, whose address spaces MSL shares.
- `run`: one kernel of MSL text on NumPy arrays, every thread a fiber, everything checked.
- `install`: a device "metal" for TVM's runtime in this process, so that an artifact made for
  Metal runs as it is: host code, launches and device memory.
"""

from __future__ import annotations

from .device import Counters, install, launches, options
from .lint import LintError, lint
from .msl import ORDERS, MSLError, Order, kernels, run

__all__ = [
    "ORDERS",
    "Counters",
    "LintError",
    "MSLError",
    "Order",
    "install",
    "kernels",
    "launches",
    "lint",
    "options",
    "run",
]
