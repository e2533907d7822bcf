"""Strict JSON for untrusted files: size cap, UTF-8, no duplicate keys, bounded nesting."""

from __future__ import annotations

import json
from typing import Any

from ..errors import BadCheckpoint


class _Duplicate(ValueError):
    pass


class _Constant(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Duplicate(key)
            seen.add(key)
    return out


def _refuse(constant: str) -> Any:
    raise _Constant(constant)


def parse_object(data: bytes, where: str, *, nonfinite: bool) -> dict[str, Any]:
    """The JSON object in `data`; raises BadCheckpoint naming `where` on anything else.

    `nonfinite` admits the words NaN and Infinity, which json.dump writes and which real
    config files hold in fields that have nothing to do with MoE layers.
    """

    def bad(message: str, need: str = "a JSON object") -> BadCheckpoint:
        return BadCheckpoint(message, where=where, need=need, hint="download the file again")

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad(f"not UTF-8 at byte {error.start}", "a JSON object in UTF-8") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=None if nonfinite else _refuse,
        )
    except _Duplicate as error:
        need = "every key once, as two readers may disagree on which one counts"
        raise bad(f"the key {str(error)!r} occurs twice", need) from None
    except _Constant as error:
        raise bad(f"{error} is not JSON", "finite numbers") from None
    except RecursionError:
        raise bad("nested too deeply", "a flat JSON object") from None
    except ValueError as error:
        raise bad(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad(f"holds a {type(value).__name__}, not an object")
    return value
