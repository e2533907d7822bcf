"""Packing a panel into its compact form, where it has one (compact.py tells the form)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .compact import CODES, COUNT, FIRST, LINE, PANEL, PLAIN, STEP, most_rare, rare
from .emit import Emit, i64
from .kernel import loop, scalar, when

# load(word), store(word, value): int32 words of one panel's slot.
Load = Callable[[Any], Any]
Store = Callable[[Any, Any], None]

_BYTES = 256
_RARE = CODES  # in place of a code: the byte has none


def _i32(value: int) -> Any:
    return tirx.const(value, "int32")


def _byte(word: Any, number: int) -> Any:
    return tirx.BitwiseAnd(tirx.RShift(word, _i32(8 * number)), _i32(0xFF))


def shorten(em: Emit, load: Load, store: Store, depth: int) -> None:
    """Turn a slot whose rows 1 to `depth` hold a panel into the panel's form."""
    codes = T.alloc_buffer((_BYTES,), "int32")
    table = T.alloc_buffer((CODES,), "int32")
    count = _count(em, load, depth)
    number = em.bind(_choose(em, count, codes, table, PANEL * depth * 2))
    with loop(CODES) as word:
        value = _i32(0)
        for byte in range(4):
            at = tirx.floormod(word, i64(4)) * i64(4) + i64(byte)
            one = tirx.LShift(tirx.BufferLoad(table, [at]), _i32(8 * byte))
            value = tirx.BitwiseOr(value, one)
        store(word, value)
    with loop(FIRST, COUNT) as word:
        store(word, _i32(0))
    short = em.bind(number <= _i32(most_rare(depth)))
    store(i64(COUNT), em.bind(tirx.Select(short, number, _i32(PLAIN))))
    with when(short):
        _write(em, load, store, codes, depth)


def _count(em: Emit, load: Load, depth: int) -> Any:
    """How often each high byte occurs."""
    # In a table for each of eight bytes in turn: in one, where few bytes are so frequent, each
    # addition would wait for the one before it.
    tables = 8
    parts = T.alloc_buffer((tables, _BYTES), "int32")
    count = T.alloc_buffer((_BYTES,), "int32")
    with loop(tables) as table, loop(_BYTES) as byte:
        T.buffer_store(parts, _i32(0), [table, byte])
    with loop(PANEL * depth // 4) as four:
        for table in range(tables):
            word = em.bind(load(i64(PANEL) + four * i64(4) + i64(table // 2)))
            at = [i64(table), em.bind(_byte(word, 2 * (table % 2) + 1))]
            T.buffer_store(parts, tirx.BufferLoad(parts, at) + _i32(1), at)
    with loop(_BYTES) as byte:
        found = (tirx.BufferLoad(parts, [i64(table), byte]) for table in range(tables))
        T.buffer_store(count, sum(found, _i32(0)), [byte])
    return count


def _choose(em: Emit, count: Any, codes: Any, table: Any, weights: int) -> Any:
    """Zero and the 15 most frequent other bytes into `table`, and their codes.

    Of equally frequent bytes the lowest comes first. Gives how many weights have none of them.
    """
    with loop(_BYTES) as byte:
        T.buffer_store(codes, _i32(_RARE), [byte])
    others = scalar("int32", _i32(weights))

    def take(code: Any, byte: Any) -> None:
        left = tirx.BufferLoad(others, [0]) - tirx.BufferLoad(count, [byte])
        T.buffer_store(others, left, [0])
        T.buffer_store(table, byte, [code])
        T.buffer_store(codes, tirx.Cast("int32", code), [byte])
        T.buffer_store(count, _i32(-1), [byte])

    take(i64(0), _i32(0))
    with loop(CODES, 1) as code:
        best = scalar("int32", _i32(1))
        with loop(_BYTES, 2) as byte:
            leads = tirx.BufferLoad(count, [tirx.BufferLoad(best, [0])])
            with when(tirx.BufferLoad(count, [byte]) > leads):
                T.buffer_store(best, tirx.Cast("int32", byte), [0])
        take(code, em.bind(tirx.BufferLoad(best, [0])))
    return tirx.BufferLoad(others, [0])


def _write(em: Emit, load: Load, store: Store, codes: Any, depth: int) -> None:
    """The compact steps over the plain ones, then the rare weights, then zeros."""
    step = T.alloc_buffer((PANEL,), "int32")
    # A compact step ends before the plain step after it begins; rare weights wait elsewhere, or
    # they would be written over plain steps that are still to be read.
    kept = T.alloc_buffer((2 * most_rare(depth),), "int32")
    found = scalar("int64", i64(0))
    with loop(depth) as k:
        plain = em.bind(i64(PANEL) + k * i64(PANEL))
        with loop(PANEL) as c:
            T.buffer_store(step, load(plain + c), [c])
        with when(_has_rare(em, step, codes)):
            _keep_rare(em, step, codes, k, kept, found)
        _compact_step(em, store, step, codes, em.bind(i64(FIRST) + k * i64(STEP)))
    words = em.bind(tirx.BufferLoad(found, [0]))
    first = i64(rare(depth))
    with loop(words) as word:
        store(first + word, tirx.BufferLoad(kept, [word]))
    with loop(i64(PANEL * (depth + 1)), em.bind(first + words)) as word:
        store(word, _i32(0))


def _has_rare(em: Emit, step: Any, codes: Any) -> Any:
    """Whether one of the 64 words in `step` has a rare weight; few have."""
    seen = scalar("int32", _i32(0))
    with loop(PANEL) as c:
        word = em.bind(tirx.BufferLoad(step, [c]))
        for half in range(2):
            code = tirx.BufferLoad(codes, [em.bind(_byte(word, 2 * half + 1))])
            T.buffer_store(seen, tirx.BitwiseOr(tirx.BufferLoad(seen, [0]), code), [0])
    return tirx.BufferLoad(seen, [0]) >= _i32(_RARE)


def _keep_rare(em: Emit, step: Any, codes: Any, k: Any, kept: Any, found: Any) -> None:
    """Move the rare weights of step k behind the `found` words in `kept`, leaving zeros."""
    for half in range(2):
        with loop(PANEL) as c:
            word = em.bind(tirx.BufferLoad(step, [c]))
            code = tirx.BufferLoad(codes, [em.bind(_byte(word, 2 * half + 1))])
            with when(tirx.EQ(code, _i32(_RARE))):
                at = em.bind(tirx.BufferLoad(found, [0]))
                place = (k * i64(2) + i64(half)) * i64(PANEL) + c
                T.buffer_store(kept, tirx.Cast("int32", place), [at])
                value = tirx.LShift(tirx.RShift(word, _i32(16 * half)), _i32(16))
                T.buffer_store(kept, value, [at + i64(1)])
                T.buffer_store(found, at + i64(2), [0])
                other = _i32(0xFFFF if half else -0x10000)
                T.buffer_store(step, tirx.BitwiseAnd(word, other), [c])


def _compact_step(em: Emit, store: Store, step: Any, codes: Any, at: Any) -> None:
    """The compact form of the 64 words in `step` to word `at` and those after it."""
    pairs = PANEL // 2
    low = T.alloc_buffer((pairs,), "int32")  # of two words, their four low bytes
    high = T.alloc_buffer((pairs,), "int32")  # and the codes of their four high ones
    with loop(pairs) as pair:
        words = [em.bind(tirx.BufferLoad(step, [pair * i64(2) + i64(c)])) for c in range(2)]
        lows = [_byte(words[byte // 2], byte % 2 * 2) for byte in range(4)]
        highs = [em.bind(_byte(words[byte // 2], byte % 2 * 2 + 1)) for byte in range(4)]
        T.buffer_store(low, _joined(lows), [pair])
        T.buffer_store(high, _joined([tirx.BufferLoad(codes, [b]) for b in highs]), [pair])
    with loop(4) as group, loop(2) as vector, loop(2) as pair:
        place = em.bind(at + group * i64(4) + vector * i64(2) + pair)
        source = em.bind(vector * i64(8) + group * i64(2) + pair)
        for half in range(2):
            store(place + i64(LINE * half), tirx.BufferLoad(low, [source + i64(LINE * half)]))
        second = tirx.LShift(tirx.BufferLoad(high, [source + i64(LINE)]), _i32(4))
        both = tirx.BitwiseOr(tirx.BufferLoad(high, [source]), second)
        store(place + i64(2 * LINE), both)


def _joined(values: list[Any]) -> Any:
    """A word of four bytes."""
    word = values[0]
    for byte, value in enumerate(values[1:], 1):
        word = tirx.BitwiseOr(word, tirx.LShift(value, _i32(8 * byte)))
    return word
