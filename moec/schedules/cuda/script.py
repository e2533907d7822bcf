"""Parse kernels written in TVMScript, without TVM's slow search for the parser at every macro."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tvm.script.parser.core.parser import ScriptMacro


@contextmanager
def quick_macros() -> Iterator[None]:
    """TVMScript that is parsed within finds the parser of a macro by a walk up the stack.

    TVM's own search walks the same frames, but has `inspect` read the source file of each first:
    40 % of lowering a block, and most of it where many modules are loaded. The pinned version
    offers no other way in than its method.
    """
    own = ScriptMacro._find_parser_def
    ScriptMacro._find_parser_def = _parser
    try:
        yield
    finally:
        ScriptMacro._find_parser_def = own


def _parser(_: ScriptMacro) -> Any:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_globals.get(ScriptMacro.parser_object_name)
        if found is not None:
            return found
        frame = frame.f_back
    raise RuntimeError("a TVMScript macro was called outside of a kernel")
