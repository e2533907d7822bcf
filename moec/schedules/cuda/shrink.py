"""Packing the weight of an expert into its compact form, on the host (compact.py tells the form)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..buffers import Buf, Kernel
from ..cpu.kernel import chunk, loop, scalar, when
from .compact import COLUMNS, EXCEPTION, HALF, LANES, NONE, STRIP, Layout

_CODES, _RARE = 8, 8  # a code, and what stands in place of one
_HIGH = 128  # high bytes without the sign
_COUNT, _PLACE, _FIRST = 2, 3, 4  # words of a header
_TABLES = 4
PACKS = "moec.packs"  # the attribute of a function that is for the host alone
OVERFULL = (
    "the weights of an expert have no compact form: more than one in 1024 has none of the eight "
    "pairs of exponents that are most frequent in its eight rows"
)


def _i64(value: int) -> Any:
    return tirx.const(value, "int64")


def _i32(value: int) -> Any:
    return tirx.const(value, "int32")


def pack(symbol: str, layout: Layout, gated: bool) -> Kernel:
    """src [rows, inner] uint16, the bits -> dst [expert_bytes / 4] int32; ValueError if OVERFULL."""
    args = (
        Buf("src", (layout.rows, layout.inner), "uint16", True),
        Buf("dst", (layout.expert_bytes // 4,), "int32"),
    )
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol)
        T.func_attr({"global_symbol": symbol, "tirx.noalias": True, PACKS: True})
        handles = [T.arg(f"{a.name}_handle", T.handle()) for a in args]
        threads = T.arg("threads", T.int64())
        sizes = [_i64(layout.rows), _i64(layout.inner)]
        src = T.match_buffer(handles[0], sizes, "uint16", align=2)
        dst = T.match_buffer(handles[1], [_i64(layout.expert_bytes // 4)], "int32", align=16)
        own = _Expert(layout, gated, src, dst)
        with chunk(_i64(layout.strips), threads) as (begin, end):
            codes = T.alloc_buffer((_HIGH,), "int32")
            with loop(end, begin) as strip:
                own.strip(strip, codes)
        own.rest()
    return Kernel(symbol, args, ib.get())


class _Expert:
    """The statements that pack one expert."""

    def __init__(self, layout: Layout, gated: bool, src: Any, dst: Any) -> None:
        self.layout, self.gated, self.src, self.dst = layout, gated, src, dst

    def strip(self, strip: Any, codes: Any) -> None:
        """A strip, but for the exceptions that find no room in it."""
        base = T.bind(strip * _i64(self.layout.strip_bytes // 4))
        first = T.bind(self._first_row(strip))
        self._choose(first, base, codes)
        with loop(self.layout.inline * EXCEPTION // 4) as word:
            T.buffer_store(self.dst, _i32(0), [base + _i64(_FIRST) + word])
        found, last = self._none_yet()

        def keep(number: Any, what: Any, where: Any) -> None:
            with when(number < _i32(self.layout.inline)):
                at = T.bind(base + _i64(_FIRST) + tirx.Cast("int64", number) * _i64(2))
                T.buffer_store(self.dst, what, [at])
                T.buffer_store(self.dst, where, [at + _i64(1)])

        with self._lanes() as (half, g, q):
            values = self._values(first, half, g, q)
            own = [T.bind(tirx.BufferLoad(codes, [self._high(v)])) for v in values]
            units = base + _i64(self.layout.header // 4) + half * _i64(HALF // 4)
            lane = T.bind(g * _i64(4) + q)
            for word in range(2):
                low = [v & _i32(0xFF) for v in values[word * 4 : word * 4 + 4]]
                at = units + lane * _i64(2) + _i64(word)
                T.buffer_store(self.dst, _or(low, (0, 8, 16, 24)), [at])
            signs = [v >> _i32(15) for v in values]
            places = (7, 15, 23, 31, 3, 11, 19, 27)
            named = _or([c & _i32(_CODES - 1) for c in own], tuple(range(0, 32, 4)))
            at = units + _i64(256 // 4) + lane
            T.buffer_store(self.dst, named | _or(signs, places), [at])
            rare = own[0]
            for code in own[1:]:
                rare = rare | code
            with when(rare >= _i32(_RARE)):
                self._exceptions(values, own, half, lane, found, last, keep)
        T.buffer_store(self.dst, tirx.BufferLoad(found, [0]), [base + _i64(_COUNT)])
        T.buffer_store(self.dst, _i32(0), [base + _i64(_PLACE)])

    def rest(self) -> None:
        """The exceptions that found no room in their strips, strip after strip."""
        layout = self.layout
        pool = layout.strips * layout.strip_bytes // 4
        with loop(layout.spare * EXCEPTION // 4) as word:
            T.buffer_store(self.dst, _i32(0), [_i64(pool) + word])
        used = scalar("int32", _i32(0))
        codes = T.alloc_buffer((_HIGH,), "int32")
        with loop(layout.strips) as strip:
            base = T.bind(strip * _i64(layout.strip_bytes // 4))
            count = T.bind(tirx.BufferLoad(self.dst, [base + _i64(_COUNT)]))
            with when(count > _i32(layout.inline)):
                start = T.bind(tirx.BufferLoad(used, [0]))
                T.buffer_store(self.dst, start, [base + _i64(_PLACE)])
                # exceptions have numbers below NONE
                many = tirx.Cast("int32", count > _i32(NONE)) * _i32(layout.spare)
                T.buffer_store(used, start + many + count - _i32(layout.inline), [0])
                with loop(_HIGH) as high:
                    T.buffer_store(codes, _i32(_RARE), [high])
                for code in range(_CODES):
                    word = tirx.BufferLoad(self.dst, [base + _i64(code // 4)])
                    high = (word >> _i32(8 * (code % 4))) & _i32(0xFF)
                    T.buffer_store(codes, _i32(code), [tirx.Cast("int64", high)])
                found, last = self._none_yet()

                def keep(number: Any, what: Any, where: Any, start: Any = start) -> None:
                    place = T.bind(start + number - _i32(layout.inline))
                    room = tirx.And(number >= _i32(layout.inline), place < _i32(layout.spare))
                    with when(room):
                        at = T.bind(_i64(pool) + tirx.Cast("int64", place) * _i64(2))
                        T.buffer_store(self.dst, what, [at])
                        T.buffer_store(self.dst, where, [at + _i64(1)])

                first = T.bind(self._first_row(strip))
                with self._lanes() as (half, g, q):
                    values = self._values(first, half, g, q)
                    own = [T.bind(tirx.BufferLoad(codes, [self._high(v)])) for v in values]
                    lane = T.bind(g * _i64(4) + q)
                    self._exceptions(values, own, half, lane, found, last, keep)
        # Who calls this tells such weights from a fault by the kind of the error.
        with T.Assert(tirx.BufferLoad(used, [0]) <= _i32(layout.spare), OVERFULL, "ValueError"):
            T.evaluate(0)

    # -- parts ------------------------------------------------------------------------------
    def _first_row(self, strip: Any) -> Any:
        if not self.gated:
            return strip * _i64(STRIP)
        pair = tirx.floordiv(strip, _i64(2)) * _i64(STRIP)
        return pair + tirx.floormod(strip, _i64(2)) * _i64(self.layout.rows // 2)

    @contextmanager
    def _lanes(self) -> Iterator[tuple[Any, ...]]:
        """(half, g, q) of all lanes, from the last half to the first."""
        halves = self.layout.inner // (COLUMNS // 2)
        with loop(halves) as before, loop(STRIP) as g, loop(LANES // STRIP) as q:
            yield T.bind(_i64(halves - 1) - before), g, q

    def _none_yet(self) -> tuple[Any, Any]:
        """Of a strip: how many exceptions were found, and the number of each lane's last one."""
        last = T.alloc_buffer((LANES,), "int32")
        with loop(LANES) as lane:
            T.buffer_store(last, _i32(NONE), [lane])
        return scalar("int32", _i32(0)), last

    def _high(self, value: Any) -> Any:
        return tirx.Cast("int64", (value >> _i32(8)) & _i32(_HIGH - 1))

    def _value(self, row: Any, column: Any) -> Any:
        return T.bind(tirx.Cast("int32", tirx.BufferLoad(self.src, [row, column])))

    def _values(self, first: Any, half: Any, g: Any, q: Any) -> list[Any]:
        """The eight weights of a lane, in order of their places."""
        row = T.bind(first + g)
        start = T.bind(half * _i64(COLUMNS // 2) + q * _i64(2))
        columns = (16 * (p // 4) + 8 * (p // 2 % 2) + p % 2 for p in range(8))
        return [self._value(row, start + _i64(c)) for c in columns]

    def _exceptions(
        self,
        values: list[Any],
        codes: list[Any],
        half: Any,
        lane: Any,
        found: Any,
        last: Any,
        keep: Callable[[Any, Any, Any], None],
    ) -> None:
        for place, (value, code) in enumerate(zip(values, codes, strict=True)):
            with when(code >= _i32(_RARE)):
                number = T.bind(tirx.BufferLoad(found, [0]))
                where = _i32(place << 16) | (tirx.Cast("int32", lane) << _i32(20))
                next_one = tirx.BufferLoad(last, [lane]) << _i32(16)
                keep(number, T.bind(value | where), T.bind(tirx.Cast("int32", half) | next_one))
                T.buffer_store(last, number, [lane])
                T.buffer_store(found, number + _i32(1), [0])

    def _choose(self, first: Any, base: Any, codes: Any) -> None:
        """The eight most frequent high bytes, of equals the lowest first: header and codes."""
        # In one table each addition would wait for the one before it.
        counts = T.alloc_buffer((_TABLES, _HIGH), "int32")
        with loop(_TABLES) as table, loop(_HIGH) as high:
            T.buffer_store(counts, _i32(0), [table, high])
        with loop(STRIP) as g, loop(self.layout.inner // _TABLES) as four:
            for table in range(_TABLES):
                value = self._value(first + g, four * _i64(_TABLES) + _i64(table))
                at = [_i64(table), T.bind(self._high(value))]
                T.buffer_store(counts, tirx.BufferLoad(counts, at) + _i32(1), at)
        with loop(_HIGH) as high:
            parts = [tirx.BufferLoad(counts, [_i64(t), high]) for t in range(_TABLES)]
            T.buffer_store(counts, sum(parts[1:], parts[0]), [_i64(0), high])
            T.buffer_store(codes, _i32(_RARE), [high])
        chosen = []
        for code in range(_CODES):
            best = scalar("int64", _i64(0))
            with loop(_HIGH) as high:
                leads = tirx.BufferLoad(counts, [_i64(0), tirx.BufferLoad(best, [0])])
                with when(tirx.BufferLoad(counts, [_i64(0), high]) > leads):
                    T.buffer_store(best, high, [0])
            one = T.bind(tirx.BufferLoad(best, [0]))
            T.buffer_store(codes, _i32(code), [one])
            T.buffer_store(counts, _i32(-1), [_i64(0), one])
            chosen.append(tirx.Cast("int32", one))
        for word in range(2):
            own = _or(chosen[word * 4 : word * 4 + 4], (0, 8, 16, 24))
            T.buffer_store(self.dst, own, [base + _i64(word)])


def _or(values: list[Any], places: tuple[int, ...]) -> Any:
    """The values, each shifted to its place, in one word."""
    word = values[0] << _i32(places[0]) if places[0] else values[0]
    for value, place in zip(values[1:], places[1:], strict=True):
        word = word | (value << _i32(place))
    return word
