"""Link host code and kernels into a signed arm64 dylib for macOS 13, on any machine.

The linker is the one in PyPI's ziglang, which knows macOS and signs ad hoc; on a Mac the
system's own. TVM's runtime is looked up when the library is loaded, as on every target.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import TargetError
from . import macho_file

MINIMUM_OS = "13.0"
# Besides these prefixes, host code may only need what macOS's libSystem has (libm, libc).
RUNTIME_PREFIXES = ("_TVMFFI", "_TVMBackend")
_DYNAMIC = ("-Wl,-undefined,dynamic_lookup",)


def export(module: Any, path: Path) -> None:
    """Write the dylib of a TVM module; TargetError without a linker, or when it fails."""
    linker = find_linker()

    def compile_objects(output: str, files: list[str], **_: Any) -> None:
        link([Path(f) for f in files], Path(output), linker)

    module.export_library(str(path), fcompile=compile_objects)


def objects(module: Any, folder: Path) -> list[Path]:
    """The object files of a TVM module, as `link` takes them."""
    found: list[Path] = []

    def keep(_: str, files: list[str], **__: Any) -> None:
        for file in map(Path, files):
            found.append(folder / file.name)
            found[-1].write_bytes(file.read_bytes())

    module.export_library(str(folder / "unused.dylib"), fcompile=keep)
    return found


def link(
    files: Sequence[Path],
    path: Path,
    linker: Sequence[str] | None = None,
    against: Sequence[Path] | None = None,
) -> None:
    """Link objects into a dylib.

    With `against`, the dylibs of TVM's runtime, every symbol must be found in them or in macOS;
    otherwise what is missing is looked up at load. Raises TargetError with the linker's words.
    """
    linker = linker or find_linker()
    with tempfile.TemporaryDirectory() as folder:
        strong = []
        for number, file in enumerate(files):
            strong.append(Path(folder) / f"{number}.o")
            strong[-1].write_bytes(macho_file.without_weak_definitions(file.read_bytes()))
        lookup = _DYNAMIC if against is None else tuple(map(str, against))
        options = ("-shared", "-o", str(path), f"-Wl,-install_name,@rpath/{path.name}")
        command = [*linker, *options, *map(str, strong), *lookup]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        words = [line for line in result.stderr.splitlines() if "error" in line]
        raise TargetError(
            f"linking for macOS failed: {'; '.join(words[:5]) or result.stderr[:500]}",
            where=" ".join(linker),
        )


def find_linker() -> tuple[str, ...]:
    """The command that links for macOS; TargetError when there is none."""
    if sys.platform == "darwin":
        return ("cc", "-arch", "arm64", f"-mmacosx-version-min={MINIMUM_OS}")
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "cc", "-target", f"aarch64-macos.{MINIMUM_OS}")
    raise TargetError(
        "no linker for macOS was found",
        need="the package ziglang (or a Mac)",
        hint="pip install 'moec[metal]'",
    )
