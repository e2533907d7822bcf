"""moec compiles the Mixture-of-Experts layers of a checkpoint into artifacts, and runs them.

    import moec
    moec.compile("Qwen3-30B-A3B", target="cpu", out="qwen3.moec")
    model = moec.load("qwen3.moec")
    y = model[3](x)

Importing moec imports neither TVM nor NumPy; `moec.load` never imports the compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import MoecError

if TYPE_CHECKING:
    from .compiler import CompileOptions, Report
    from .compiler.compile import compile
    from .runtime import Block, Model, load

__version__ = "0.1.0"
__all__ = ["Block", "CompileOptions", "Model", "MoecError", "Report", "compile", "load"]

_HOMES = {
    "compile": "compiler",
    "CompileOptions": "compiler",
    "Report": "compiler",
    "load": "runtime",
    "Model": "runtime",
    "Block": "runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moec' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
