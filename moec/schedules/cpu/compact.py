"""The compact form of a bfloat16 panel: three quarters of its bytes, and not a bit lost.

Few rows of activations wait for memory, and trained weights waste it: of the 256 values that the
high byte of a bfloat16 can take (its sign and all but the last bit of its exponent), 16 are those
of nearly all weights of a panel, because magnitudes within a factor of 2^16 share 8 of them. So
a step of K keeps the low bytes as they are and a code of four bits for each high byte, 48 words
in place of 64. A rare other weight has a stand-in there, and what it is more than the stand-in
is kept beside: products with that are added when those of all steps are. A panel that has too
many of them, or one that is not exactly the sum of the two in float32, stays plain.

The stand-in has the smallest of the 16 high bytes, and zero for a low one. So it is no larger
than the column's other weights, and adding what is missing costs no more than rounding their sum.
The form of a panel is the same for whatever reads it, so no result depends on who does. Only an
infinite activation can tell them apart: times a rare weight it may be NaN, where it would be
infinite.

A panel takes depth + 1 rows of 64 words whatever its form, so that sizes are known when code is
generated; what a compact one leaves over at its end is zero and never read. In words:

    0      the 16 high bytes that have codes, the stand-in's first, four times (one vector)
    16     number of rare weights, or -1: the panel is plain, its step k is at 64 + 64 k
    32     step k at 32 + 48 k: low bytes of vectors 0 and 1, of 2 and 3, then codes (below)
    ...    rare weights by ascending K, two words each: 64 K + column, and a float32: what to add

Vectors 0 and 1 are joined from two vectors of bytes by vpunpcklbw and vpunpckhbw, so each group
of 16 bytes has 8 of vector 0, then 8 of vector 1. Of the codes, byte b has that of byte b of the
high bytes of vectors 0 and 1 in its low half, and of vectors 2 and 3 in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .emit import Emit, i64
from .isa import Isa
from .kernel import loop, when

PANEL = 64  # words: four vectors of 16
FIRST = 32  # the word at which compact steps begin
STEP = 48  # words of one
COUNT = 16  # the word with the number of rare weights
PLAIN = -1  # that number where there is no compact form
LINE = 16  # words of a cache line, and of a vector
CODES = 16  # that four bits distinguish
AHEAD = 4096  # words that one pass asks ahead: nearer gains less, farther no more


def fits(isa: Isa, dtype: str) -> bool:
    """Whether panels of `dtype` have a compact form on an instruction set."""
    return isa.byte_lookup and isa.panel == PANEL and dtype == "bfloat16"


def rare(depth: int) -> int:
    """The word with the first rare weight."""
    return FIRST + STEP * depth


def most_rare(depth: int) -> int:
    """How many rare weights a panel may have: so many take a tenth of the time of the others."""
    return -(-depth // 8)


# words() gives the vectors of a step, panel by panel; step(k, words) is what is done with word k.
Words = Callable[[], Iterator[Sequence[Any]]]
Step = Callable[[Any, Words], None]


@dataclass(frozen=True)
class Slot:
    """One panel of `depth` steps in memory, word by word."""

    em: Emit
    weights: Any
    group: Any
    panel: Any
    depth: int

    def load(self, word: Any) -> Any:
        """The vector that begins at a word."""
        at = self.em.ramp(word)
        return tirx.BufferLoad(self.weights, [self.group, self.panel, i64(0), at])

    def word(self, word: Any) -> Any:
        """One word."""
        value = tirx.BufferLoad(self.weights, [self.group, self.panel, i64(0), word])
        return tirx.Cast("int64", value)

    def ask(self, words: Any) -> None:
        """Ask for the line so many words behind the first step, be it of the next panel.

        What lies between the last step of this one and the next panel is left out.
        """
        total = STEP * self.depth
        place = i64(FIRST) + words
        later = i64(PANEL * (self.depth + 1) - total) + words
        self.prefetch(tirx.Select(words >= i64(total), later, place))

    def prefetch(self, word: Any) -> None:
        """Ask for the cache line of a word."""
        self.em.prefetch(self.weights, [self.group, self.panel, i64(0), word])


def walk(slot: Slot, begin: int, end: int, step: Step, ask: Callable[[Any], None]) -> None:
    """step(k, words) for the words [begin, end) of K, ascending, whatever the panel's form.

    `ask(k)` goes with every compact step. What rare weights add comes with `leftover`.
    """
    em = slot.em
    plain = em.bind(slot.word(i64(COUNT)) < i64(0))
    with when(plain), loop(i64(end), i64(begin)) as k:
        row = em.bind(i64(PANEL) + k * i64(PANEL))
        step(k, _stored(slot, row))
        slot.prefetch(row + i64(AHEAD))
    with when(tirx.Not(plain)):
        table = em.bind(slot.load(i64(0)))
        for line in range(2):  # what `leftover` reads when the steps are done
            slot.prefetch(i64(rare(slot.depth) + line * LINE))
        with loop(i64(end), i64(begin)) as k:
            step(k, _expanded(slot, table, k))
            ask(k)


def leftover(slot: Slot, begin: int, end: int, add: Callable[[Any, Any, Any], None]) -> None:
    """add(k, column, more) for the rare weights of the words [begin, end) of K, ascending in K."""
    em = slot.em
    with loop(em.bind(tirx.Max(slot.word(i64(COUNT)), i64(0)))) as number:
        at = em.bind(i64(rare(slot.depth)) + number * i64(2))
        place = em.bind(slot.word(at))
        k = em.bind(tirx.floordiv(place, i64(PANEL)))

        def one() -> None:
            bits = tirx.Cast("int32", slot.word(at + i64(1)))
            column = em.bind(tirx.floormod(place, i64(PANEL)))
            add(k, column, em.bind(T.reinterpret("float32", bits)))

        if (begin, end) == (0, slot.depth):
            one()
        else:
            with when(tirx.And(k >= i64(2 * begin), k < i64(2 * end))):
                one()


def _stored(slot: Slot, word: Any) -> Words:
    """The vectors of a plain step at `word`."""

    def words() -> Iterator[Sequence[Any]]:
        yield [slot.load(word + i64(j * LINE)) for j in range(PANEL // LINE)]

    return words


def _expanded(slot: Slot, table: Any, k: Any) -> Words:
    """The vectors of compact step k."""
    em = slot.em

    def call(name: str, *args: Any) -> Any:
        return em.bind(T.call_pure_extern(em.i32v, name, *args))

    def words() -> Iterator[Sequence[Any]]:
        at = em.bind(i64(FIRST) + k * i64(STEP))
        codes = em.bind(slot.load(at + i64(2 * LINE)))
        vectors = []
        for half in range(2):
            low = em.bind(slot.load(at + i64(half * LINE)))
            shifted = tirx.RShift(codes, em.isplat(4)) if half else codes
            high = call("moec_high_bytes", table, shifted)
            vectors += [call("moec_join_low", low, high), call("moec_join_high", low, high)]
        yield vectors

    return words
