"""MSL read by clang as C++ for OpenCL: address spaces, vector types, unknown names.

Apple's compiler is clang with its own address-space words; upstream clang has the same rules
under OpenCL's words. Three constructs are translated (attributes, element-wise vector casts,
the struct of scalars), and words that MSL 2.3 does not have are refused. What is checked is
only the syntax and the types: no code is generated.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

HEADER = Path(__file__).resolve().parent / "lint" / "msl.h"
# Words of later versions of the language, and of C++ that MSL leaves out.
NOT_IN_MSL_2_3 = (
    "double", "bfloat", "bfloat2", "bfloat3", "bfloat4", "simdgroup_bfloat8x8", "atomic_float",
    "mesh", "object_data", "visible_function_table", "thread_elements", "new", "delete", "goto",
    "asm", "throw", "try", "catch", "dynamic_cast", "typeid", "virtual",
)  # fmt: skip
_BANNED = re.compile(r"\b(" + "|".join(NOT_IN_MSL_2_3) + r")\b")
_SCALAR = r"(?:u?(?:char|short|int|long)|half|float|bool)"
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)


class LintError(RuntimeError):
    """The text is not MSL 2.3."""


_accepted: set[str] = set()


def lint(*sources: str) -> None:
    """Raise LintError with the first errors unless every text is accepted.

    Several texts are read together, each in a namespace of its own: a fifth of the time.
    """
    fresh = [source for source in dict.fromkeys(sources) if source not in _accepted]
    for source in fresh:
        word = _BANNED.search(_COMMENT.sub("", source))
        if word:
            raise LintError(f"'{word[1]}' is not in MSL 2.3")
    if not fresh:
        return
    parts = [f"namespace k{i} {{\n#line 1\n{translate(s)}\n}}\n" for i, s in enumerate(fresh)]
    text = "".join([f'#include "{HEADER}"\n', *parts])
    result = subprocess.run(_command(), input=text, text=True, capture_output=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        raise LintError("\n".join(errors[:5]) or result.stderr[:2000])
    _accepted.update(fresh)


def translate(source: str) -> str:
    """MSL as C++ for OpenCL, to which the header belongs."""
    text = source.replace("#include <metal_stdlib>", "")
    text = re.sub(
        r"constant\s+(\w+)&\s+(\w+)\s*\[\[\s*buffer\(\d+\)\s*\]\]", r"constant \1* \2_", text
    )
    text = re.sub(r"\barg\.", "arg_->", text)
    text = re.sub(r"\[\[[^\]]*\]\]", "", text)
    text = re.sub(rf"\(({_SCALAR}[234])\)", r"metal::cast<\1>()->*", text)
    text = re.sub(rf"\b({_SCALAR}[234])\((?!\))", r"metal::make_\1(", text)
    return re.sub(r"\bkernel\b", "__kernel", text)


@cache
def _command() -> tuple[str, ...]:
    """clang: the system's, or the one inside PyPI's ziglang."""
    options = (
        "-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-target", "spir64",
        "-fsyntax-only", "-Wall", "-Wno-unused", "-Wno-unknown-pragmas", "-",
    )  # fmt: skip
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "clang", *options)
    found = next((n for n in ("clang", "clang-19", "clang-14") if shutil.which(n)), None)
    if found is None:
        raise LintError("clang was not found: pip install ziglang, or install clang")
    return (found, *options)
