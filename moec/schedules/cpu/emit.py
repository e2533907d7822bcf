"""Vector arithmetic as TIR expressions: the small language in which CPU kernels are written.

Works on float32 vectors of `isa.lanes` lanes and on the raw 16-bit patterns of bfloat16.
TVM's own bfloat16 is avoided on purpose: binding a cast of a bfloat16 load to a variable
converts the raw bits as a number (silently wrong), so bfloat16 is uint16 in every buffer
and is widened and narrowed here, in integer arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .isa import Isa

_LOG2E = 1.4426950408889634
_LN2_HI = 0.693145751953125  # 11 significant bits: n * _LN2_HI is exact for |n| < 2^13
_LN2_LO = 1.4286068203094172e-06
_EXP_LOW, _EXP_HIGH = -87.0, 88.0  # exp stays normal and finite in between
# Taylor coefficients of e^r for |r| <= ln2/2: the first omitted term is r^8/8! < 6e-9.
_EXP_POLY = tuple(1.0 / math.factorial(i) for i in range(7, -1, -1))
# tanh x = x - x^3/3 + 2x^5/15 - 17x^7/315 + 62x^9/2835 - ...: 9e-3 x^10 is left out.
_TANH_POLY = (62.0 / 2835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0)
_TANH_NEAR = 0.3
# Abramowitz and Stegun 7.1.26: |error| of erf <= 1.5e-7.
_ERF_P = 0.3275911
_ERF_POLY = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def i64(value: int) -> Any:
    """An int64 constant: weights hold more than 2^31 elements, so all indices are int64."""
    return tirx.const(value, "int64")


def f32(value: float) -> Any:
    """A float32 constant."""
    return tirx.const(value, "float32")


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is >= value."""
    return -(-value // multiple) * multiple


class Emit:
    """Expressions and statements for one instruction set (call inside an IRBuilder)."""

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self.lanes = isa.lanes
        self.f32v = f"float32x{isa.lanes}"
        self.i32v = f"int32x{isa.lanes}"

    def release_registers(self) -> None:
        """Keep LLVM from holding constants of an epilogue in registers that a tile needs."""
        T.evaluate(T.call_extern("int32", "moec_release_registers"))

    # -- values ---------------------------------------------------------------------------
    def splat(self, value: Any) -> Any:
        """A scalar (expression or number) in every lane."""
        if isinstance(value, (int, float)):
            value = f32(float(value))
        return tirx.Broadcast(value, self.lanes)

    def isplat(self, value: int) -> Any:
        """An int32 constant in every lane."""
        return tirx.Broadcast(tirx.const(value, "int32"), self.lanes)

    def ramp(self, base: Any) -> Any:
        """The contiguous index of one vector at `base`."""
        return tirx.Ramp(base, i64(1), self.lanes)

    def lane_ids(self, first: int) -> Any:
        """int32 lanes first, first + 1, ..."""
        return tirx.Ramp(tirx.const(first, "int32"), tirx.const(1, "int32"), self.lanes)

    def bind(self, value: Any) -> Any:
        """Name a value, so that it is computed once."""
        return T.bind(value)

    def keep_order(self) -> None:
        """Keep LLVM from loading early what a later step needs, for want of registers."""
        T.evaluate(T.call_extern("int32", "moec_keep_order"))

    # -- arithmetic -----------------------------------------------------------------------
    def intrinsic(self, name: str, dtype: str, *args: Any) -> Any:
        """A pure LLVM intrinsic."""
        return T.call_llvm_pure_intrin(dtype, T.llvm_lookup_intrinsic_id(name), *args)

    def prefetch(self, buffer: Any, indices: list[Any]) -> None:
        """Ask for the cache line of an element into the L2; it may lie behind the buffer's end."""
        place = T.address_of(tirx.BufferLoad(buffer, indices))
        read, l2, data = (tirx.const(value, "int32") for value in (0, 2, 1))
        number = T.llvm_lookup_intrinsic_id("llvm.prefetch")
        T.evaluate(T.call_llvm_intrin("void", number, place, read, l2, data))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, fused where the machine can (a library call where it cannot)."""
        if not self.isa.fma:
            return a * b + c
        return self.intrinsic("llvm.fma", self.f32v, a, b, c)

    def at_most(self, x: Any, limit: float) -> Any:
        """min(x, limit); NaN stays NaN."""
        # The order matters: min(a, b) becomes a < b ? a : b, which is b where either is NaN.
        return tirx.Min(self.splat(limit), x)

    def at_least(self, x: Any, limit: float) -> Any:
        """max(x, limit); NaN stays NaN."""
        return tirx.Max(self.splat(limit), x)

    def dot_bf16(self, acc: Any, words: Any, word: Any) -> Any:
        """acc + w0 * a0 + w1 * a1 for a pair of bfloat16 in each 32-bit lane (where `bf16_dot`)."""
        return T.call_pure_extern(self.f32v, "moec_dpbf16", acc, words, word)

    def reduce_max(self, vector: Any) -> Any:
        """The largest lane of a vector without NaN."""
        # LLVM's own reduction honours NaN lane by lane, which costs seven dependent steps. Max
        # and not Select: TVM follows both sides of a Select back through every halving, which
        # took 3 s for 16 lanes.
        return self._halves(vector, tirx.Max)

    def reduce_min_i32(self, vector: Any) -> Any:
        """The smallest int32 lane."""
        return self.intrinsic("llvm.vector.reduce.smin", "int32", vector)

    def reduce_add(self, vector: Any) -> Any:
        """The sum of the lanes, in a fixed order (halves first)."""
        return self._halves(vector, lambda a, b: a + b)

    def _halves(self, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
        width = self.lanes
        while width > 1:
            width //= 2
            low = [tirx.const(i, "int32") for i in range(width)]
            high = [tirx.const(i + width, "int32") for i in range(width)]
            parts = tirx.Shuffle([vector], low), tirx.Shuffle([vector], high)
            vector = self.bind(combine(*map(self.bind, parts)))
        return vector

    def exp(self, x: Any) -> Any:
        """e^x, relative error below 3e-7 (LLVM would call libm once a lane); NaN stays NaN."""
        x = self.bind(self.at_least(self.at_most(x, _EXP_HIGH), _EXP_LOW))
        n = self.bind(self.intrinsic("llvm.rint", self.f32v, x * self.splat(_LOG2E)))
        r = self.bind(self.fma(n, self.splat(-_LN2_HI), x))
        r = self.bind(self.fma(n, self.splat(-_LN2_LO), r))
        p = self.splat(_EXP_POLY[0])
        for c in _EXP_POLY[1:]:
            p = self.bind(self.fma(p, r, self.splat(c)))
        # Only here NaN must become a number: converting it to an integer is undefined.
        whole = tirx.Cast(self.i32v, self.bind(tirx.Min(n, self.splat(128.0))))
        bits = whole + self.isplat(127)
        scale = T.reinterpret(self.f32v, tirx.LShift(bits, self.isplat(23)))
        return self.bind(p * scale)

    def sigmoid(self, x: Any) -> Any:
        """1 / (1 + e^-x)."""
        one = self.splat(1.0)
        return self.bind(one / (one + self.exp(self.splat(0.0) - x)))

    def tanh(self, x: Any) -> Any:
        """tanh(x), relative error below 1e-6: a series near 0, where 2 sigmoid(2x) - 1 cancels."""
        x = self.bind(x)
        square = self.bind(x * x)
        p = self.splat(_TANH_POLY[0])
        for c in _TANH_POLY[1:]:
            p = self.bind(self.fma(p, square, self.splat(c)))
        two = self.splat(2.0)
        far = two * self.sigmoid(two * x) - self.splat(1.0)
        near = square < self.splat(_TANH_NEAR * _TANH_NEAR)
        return self.bind(tirx.Select(near, p * x, far))

    def soft_cap(self, x: Any, cap: float) -> Any:
        """cap * tanh(x / cap)."""
        return self.bind(self.splat(cap) * self.tanh(x * self.splat(1.0 / cap)))

    def erf(self, x: Any) -> Any:
        """erf(x), absolute error below 2e-7."""
        zero, one = self.splat(0.0), self.splat(1.0)
        a = self.bind(self.intrinsic("llvm.fabs", self.f32v, x))
        t = self.bind(one / self.fma(a, self.splat(_ERF_P), one))
        p = self.splat(_ERF_POLY[0])
        for c in _ERF_POLY[1:]:
            p = self.bind(self.fma(p, t, self.splat(c)))
        y = self.bind(one - p * t * self.exp(zero - a * a))
        return self.bind(tirx.Select(x < zero, zero - y, y))

    # -- 16-bit floats ---------------------------------------------------------------------
    def widen_bf16(self, bits: Any) -> Any:
        """uint16 lanes holding bfloat16 -> float32 lanes."""
        wide = tirx.Cast(self.i32v, bits)
        return T.reinterpret(self.f32v, tirx.LShift(wide, self.isplat(16)))

    def narrow_bf16(self, x: Any) -> Any:
        """float32 lanes -> uint16 lanes holding bfloat16, nearest even, NaN stays NaN."""
        lanes = f"uint16x{self.lanes}"
        if self.isa.bf16_dot:
            raw = T.call_pure_extern(f"int16x{self.lanes}", "moec_cvtbf16", x)
            return T.reinterpret(lanes, raw)
        return tirx.Cast(lanes, tirx.RShift(self._rounded_bits(x), self.isplat(16)))

    def _rounded_bits(self, x: Any) -> Any:
        x = self.bind(x)
        bits = self.bind(T.reinterpret(self.i32v, x))
        odd = tirx.BitwiseAnd(tirx.RShift(bits, self.isplat(16)), self.isplat(1))
        rounded = bits + odd + self.isplat(0x7FFF)
        nan = self.isplat(0x7FC00000)
        return self.bind(tirx.Select(tirx.NE(x, x), nan, rounded))

    def round_to(self, x: Any, dtype: str) -> Any:
        """float32 lanes rounded to what `dtype` can hold, still as float32."""
        if dtype == "bfloat16":
            kept = tirx.BitwiseAnd(self._rounded_bits(x), self.isplat(-65536))
            return self.bind(T.reinterpret(self.f32v, kept))
        if dtype == "float16":
            half = f"float16x{self.lanes}"
            return self.bind(tirx.Cast(self.f32v, tirx.Cast(half, x)))
        return x

    def load(self, buffer: Any, indices: list[Any], dtype: str) -> Any:
        """One vector of `dtype` values from a buffer, as float32 lanes."""
        raw = tirx.BufferLoad(buffer, [*indices[:-1], self.ramp(indices[-1])])
        if dtype == "bfloat16":
            return self.widen_bf16(raw)
        if dtype == "float16":
            return tirx.Cast(self.f32v, raw)
        return raw

    def store(self, buffer: Any, value: Any, indices: list[Any], dtype: str) -> None:
        """float32 lanes into a buffer of `dtype` values, rounded to nearest even."""
        if dtype == "bfloat16":
            value = self.narrow_bf16(value)
        elif dtype == "float16":
            value = tirx.Cast(f"float16x{self.lanes}", value)
        T.buffer_store(buffer, value, [*indices[:-1], self.ramp(indices[-1])])


def storage(dtype: str) -> str:
    """The dtype a buffer of `dtype` values is declared with: bfloat16 travels as uint16."""
    return "uint16" if dtype == "bfloat16" else dtype
