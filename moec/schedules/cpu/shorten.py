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
_RARES = 0x10101010  # the bit of it in each of four codes


def _i32(value: int) -> Any:
    return tirx.const(value, "int32")


def _byte(word: Any, number: int) -> Any:
    return tirx.BitwiseAnd(tirx.RShift(word, _i32(8 * number)), _i32(0xFF))


def shorten(em: Emit, load: Load, store: Store, depth: int) -> None:
    """Turn a slot whose rows 1 to `depth` hold a panel into the panel's form."""
    codes = T.alloc_buffer((_BYTES,), "int32")
    table = T.alloc_buffer((CODES,), "int32")
    steps = T.alloc_buffer((STEP * depth,), "int32")
    kept = T.alloc_buffer((2 * most_rare(depth),), "int32")
    count = _count(em, load, depth)
    number = em.bind(_choose(em, count, codes, table, PANEL * depth * 2))
    _stand_in_first(em, codes, table)
    short = scalar("int32", tirx.Cast("int32", number <= _i32(most_rare(depth))))
    with when(_is(short)):
        # Elsewhere: whether the panel may be written over is known when all of it was seen.
        _compress(em, load, codes, table, steps, kept, short, depth)
    with loop(CODES) as word:
        at = tirx.floormod(word, i64(4)) * i64(4)
        store(word, _joined([tirx.BufferLoad(table, [at + i64(byte)]) for byte in range(4)]))
    with loop(FIRST, COUNT) as word:
        store(word, _i32(0))
    store(i64(COUNT), em.bind(tirx.Select(_is(short), number, _i32(PLAIN))))
    with when(_is(short)):
        words = em.bind(tirx.Cast("int64", number) * i64(2))
        with loop(STEP * depth) as word:
            store(i64(FIRST) + word, tirx.BufferLoad(steps, [word]))
        with loop(words) as word:
            store(i64(rare(depth)) + word, tirx.BufferLoad(kept, [word]))
        with loop(i64(PANEL * (depth + 1)), em.bind(i64(rare(depth)) + words)) as word:
            store(word, _i32(0))


def _is(flag: Any) -> Any:
    return tirx.NE(tirx.BufferLoad(flag, [0]), _i32(0))


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
    """The most frequent bytes into `table`, and their codes; how many weights have another.

    Of equally frequent bytes the lowest comes first.
    """
    with loop(_BYTES) as byte:
        T.buffer_store(codes, _i32(_RARE), [byte])
    others = scalar("int32", _i32(weights))
    with loop(CODES) as code:
        best = scalar("int32", _i32(0))
        with loop(_BYTES, 1) as byte:
            leads = tirx.BufferLoad(count, [tirx.BufferLoad(best, [0])])
            with when(tirx.BufferLoad(count, [byte]) > leads):
                T.buffer_store(best, tirx.Cast("int32", byte), [0])
        chosen = em.bind(tirx.BufferLoad(best, [0]))
        left = tirx.BufferLoad(others, [0]) - tirx.BufferLoad(count, [chosen])
        T.buffer_store(others, left, [0])
        T.buffer_store(table, chosen, [code])
        T.buffer_store(codes, tirx.Cast("int32", code), [chosen])
        T.buffer_store(count, _i32(-1), [chosen])
    return tirx.BufferLoad(others, [0])


def _stand_in_first(em: Emit, codes: Any, table: Any) -> None:
    """Give code 0 to the byte of the smallest magnitude."""
    least = scalar("int32", _i32(0))
    with loop(CODES, 1) as code:
        own = tirx.BitwiseAnd(tirx.BufferLoad(table, [code]), _i32(0x7F))
        held = tirx.BufferLoad(table, [tirx.BufferLoad(least, [0])])
        with when(own < tirx.BitwiseAnd(held, _i32(0x7F))):
            T.buffer_store(least, tirx.Cast("int32", code), [0])
    code = em.bind(tirx.BufferLoad(least, [0]))
    first = em.bind(tirx.BufferLoad(table, [0]))
    small = em.bind(tirx.BufferLoad(table, [code]))
    T.buffer_store(table, first, [code])
    T.buffer_store(table, small, [0])
    T.buffer_store(codes, code, [first])
    T.buffer_store(codes, _i32(0), [small])


def _compress(
    em: Emit,
    load: Load,
    codes: Any,
    table: Any,
    steps: Any,
    kept: Any,
    short: Any,
    depth: int,
) -> None:
    """All steps in their compact form into `steps`, rare weights as a slot keeps them into `kept`.

    `short` = 0 where one of them would be lost.
    """
    pairs = PANEL // 2
    low = T.alloc_buffer((pairs,), "int32")  # of two words, their four low bytes
    high = T.alloc_buffer((pairs,), "int32")  # and the codes of their four high ones
    found = scalar("int64", i64(0))
    stand_in = em.bind(_as_float(tirx.LShift(tirx.BufferLoad(table, [0]), _i32(8))))
    with loop(depth) as k:
        row = em.bind(i64(PANEL) + k * i64(PANEL))
        seen = scalar("int32", _i32(0))
        with loop(pairs) as pair:
            words = [em.bind(load(row + pair * i64(2) + i64(c))) for c in range(2)]
            lows = [_byte(words[byte // 2], byte % 2 * 2) for byte in range(4)]
            highs = [em.bind(_byte(words[byte // 2], byte % 2 * 2 + 1)) for byte in range(4)]
            own = em.bind(_joined([tirx.BufferLoad(codes, [byte]) for byte in highs]))
            T.buffer_store(low, _joined(lows), [pair])
            T.buffer_store(high, own, [pair])
            T.buffer_store(seen, tirx.BitwiseOr(tirx.BufferLoad(seen, [0]), own), [0])
        with when(tirx.NE(tirx.BitwiseAnd(tirx.BufferLoad(seen, [0]), _i32(_RARES)), _i32(0))):
            for half in range(2):
                with loop(PANEL) as c:
                    word = em.bind(load(row + c))
                    code = tirx.BufferLoad(codes, [em.bind(_byte(word, 2 * half + 1))])
                    with when(tirx.EQ(code, _i32(_RARE))):
                        weight = em.bind(tirx.RShift(word, _i32(16 * half)))
                        place = (k * i64(2) + i64(half)) * i64(PANEL) + c
                        _keep(em, weight, place, stand_in, kept, found, short)
            with loop(pairs) as pair:
                # Code and low byte of a stand-in are 0: clear the bytes whose code is _RARE.
                own = em.bind(tirx.BufferLoad(high, [pair]))
                ones = tirx.RShift(tirx.BitwiseAnd(own, _i32(_RARES)), _i32(4))
                others = em.bind(tirx.bitwise_not(ones * _i32(0xFF)))
                T.buffer_store(high, tirx.BitwiseAnd(own, others), [pair])
                rest = tirx.BitwiseAnd(tirx.BufferLoad(low, [pair]), others)
                T.buffer_store(low, rest, [pair])
        _place(em, low, high, steps, em.bind(k * i64(STEP)))


def _keep(
    em: Emit, weight: Any, place: Any, stand_in: Any, kept: Any, found: Any, short: Any
) -> None:
    """One rare weight behind those in `kept`."""
    more = em.bind(_as_float(weight) - stand_in)
    at = em.bind(tirx.BufferLoad(found, [0]))
    T.buffer_store(kept, tirx.Cast("int32", place), [at])
    T.buffer_store(kept, T.reinterpret("int32", more), [at + i64(1)])
    T.buffer_store(found, at + i64(2), [0])
    again = T.reinterpret("int32", em.bind(more + stand_in))
    with when(tirx.NE(again, tirx.LShift(weight, _i32(16)))):
        T.buffer_store(short, _i32(0), [0])


def _as_float(bits: Any) -> Any:
    """A bfloat16, by its bits, as float32."""
    return T.reinterpret("float32", tirx.LShift(bits, _i32(16)))


def _place(em: Emit, low: Any, high: Any, steps: Any, at: Any) -> None:
    """The bytes of a step, pair after pair of words, where a compact step has them."""
    with loop(4) as group, loop(2) as vector, loop(2) as pair:
        place = em.bind(at + group * i64(4) + vector * i64(2) + pair)
        source = em.bind(vector * i64(8) + group * i64(2) + pair)
        for half in range(2):
            own = tirx.BufferLoad(low, [source + i64(LINE * half)])
            T.buffer_store(steps, own, [place + i64(LINE * half)])
        second = tirx.LShift(tirx.BufferLoad(high, [source + i64(LINE)]), _i32(4))
        both = tirx.BitwiseOr(tirx.BufferLoad(high, [source]), second)
        T.buffer_store(steps, both, [place + i64(2 * LINE)])


def _joined(values: list[Any]) -> Any:
    """A word of four bytes."""
    word = values[0]
    for byte, value in enumerate(values[1:], 1):
        word = tirx.BitwiseOr(word, tirx.LShift(value, _i32(8 * byte)))
    return word
