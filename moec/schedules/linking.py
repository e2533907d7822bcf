"""From a compiled module to a shared library, with C source in it, by the system's C compiler."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import TargetError
from ..target import Target
from . import calls

# A linker by the architecture that it links for; the system's own compiler links for itself.
_CROSS = {"aarch64": "aarch64-linux-gnu-gcc", "x86_64": "x86_64-linux-gnu-gcc"}
_OWN = ("cc", "gcc", "clang")


def find_linker(target: Target) -> str:
    """The compiler driver that links for `target`; TargetError when there is none."""
    names = _OWN if target.runs_here else (_CROSS[target.arch],)
    for name in names:
        if shutil.which(name):
            return name
    raise TargetError(
        f"no linker for {target.name} was found",
        need=" or ".join(names),
        hint="install a C compiler, for instance the Debian package "
        + ("gcc" if target.runs_here else f"gcc-{target.arch.replace('_', '-')}-linux-gnu"),
    )


def link(module: Any, target: Target, path: Path, sources: Sequence[str] = ()) -> None:
    """Write the shared library of a compiled module, with how it is called, and further C source.

    Raises TargetError when no linker for the target is installed, or the linker fails.
    """
    linker = find_linker(target)
    source = path.with_suffix(".c")
    source.write_text("".join((calls.SOURCE, *sources)))
    try:
        options = ["-s", "-O2", "-fvisibility=hidden", str(source)]
        module.export_library(str(path), cc=linker, options=options)
    except (RuntimeError, OSError) as error:
        raise TargetError(
            f"linking for {target.name} failed: {_last_words(str(error))}",
            where=linker,
            need="a C compiler that links shared libraries",
        ) from None
    finally:
        source.unlink()


def _last_words(text: str) -> str:
    """The last line that a linker wrote, without the command line that TVM puts after it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Command line:", "Compilation error"))]
    return (said or lines or ["it said nothing"])[-1]
