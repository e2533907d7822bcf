"""Compact weights from shared memory to registers: the A side of mma.sync and wgmma.

A byte permutation looks four codes up at a time and makes pairs of bfloat16 (compact.py tells the
form). What a lane loads it needs itself, so that nothing is exchanged but exceptions.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from tvm.script import tirx as T

from .compact import HALF, NONE

TABLE, RAW = 4, 6  # words of two strips: their high bytes, a half of each
HELD = 3  # words in which a warp keeps which exceptions are next
SCRATCH = 64  # words of shared memory that a warp needs to find its first exceptions


class Rare(Enum):
    """How a warp comes to the exceptions of the halves that it expands."""

    OWN = "own"  # a lane knows its next one: for warps that have all units of their strips
    ASK = "ask"  # lanes hold all and hand them out: for warps that have few units of a strip each


# Headers and units are in shared memory, `pool` has the expert's exceptions without room.
#
# OWN: a lane knows the next exception of its own in either strip, half << 16 | number, and compares
# the sooner of the two with the half at hand. To find the first ones takes a while. ASK: lanes 0 to
# 13 hold exceptions of the first strip, 16 to 29 of the second; all look whether one of them is in
# the half at hand, and it is handed to the lane that needs it. A warp that meets an exception is
# late, and by wgmma the other three of its group wait for it: handed out so, exceptions cost the
# streams 13 to 23 % of the time where tokens are many. By OWN `gather` takes 1.05 to 1.25 times as
# long.
EXPAND = r"""
#ifndef MOEC_EXPAND
#define MOEC_EXPAND
template <int INLINE>
__forceinline__ __device__ uint2 moec_exception(const void* header, const void* pool, int number) {
  if (number < INLINE) return ((const uint2*)header)[2 + number];
  return __ldg((const uint2*)pool + ((const int*)header)[3] + number - INLINE);
}
__forceinline__ __device__ void moec_expand_table(unsigned* table, const void* header0,
                                                  const void* header1) {
  uint2 a = *(const uint2*)header0, b = *(const uint2*)header1;
  table[0] = a.x, table[1] = a.y, table[2] = b.x, table[3] = b.y;
  // Opaque: ptxas keeps them in uniform registers, from which they are moved for every use.
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(table[i]));
}
__forceinline__ __device__ unsigned moec_expand_place(const void* packed, int bytes) {
  unsigned place = (unsigned)__cvta_generic_to_shared(packed) + bytes * (threadIdx.x & 31);
  asm volatile("" : "+r"(place));
  return place;
}
// In order with what is volatile before and behind it: loads that sink to where their values are
// needed are waited for there.
template <int HALVES>
__forceinline__ __device__ void moec_expand_load(unsigned* raw, unsigned low, unsigned codes,
                                                 int one, int two) {
#pragma unroll
  for (int i = 0; i < 2 * HALVES; ++i) {
    int own = (i & 1 ? two : one) + (i >> 1) * @HALF@;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(raw[3 * i]), "=r"(raw[3 * i + 1]) : "r"(low + own) : "memory");
    asm volatile("ld.shared.u32 %0, [%1 + 256];"
                 : "=r"(raw[3 * i + 2]) : "r"(codes + own) : "memory");
  }
}
template <int HALVES>
__forceinline__ __device__ void moec_expand(unsigned* out, const unsigned* raw,
                                            const unsigned* table) {
#pragma unroll
  for (int i = 0; i < 2 * HALVES; ++i) {
    unsigned x = table[2 * (i & 1)], y = table[2 * (i & 1) + 1];
    unsigned codes = raw[3 * i + 2], named = codes & 0x77777777u;
    unsigned even = __byte_perm(x, y, named) | (codes & 0x80808080u);
    unsigned odd = __byte_perm(x, y, named >> 16) | ((codes << 4) & 0x80808080u);
    unsigned* own = out + (i >> 1) * 8 + (i & 1);
    own[0] = __byte_perm(raw[3 * i], even, 0x5140);
    own[2] = __byte_perm(raw[3 * i], even, 0x7362);
    own[4] = __byte_perm(raw[3 * i + 1], odd, 0x5140);
    own[6] = __byte_perm(raw[3 * i + 1], odd, 0x7362);
  }
}
// An exception in its place, in the half `half` of those in `out`.
template <int HALVES>
__forceinline__ __device__ void moec_patch(unsigned* out, unsigned one, unsigned half, int strip) {
  unsigned at = half * 8 + (one >> 16 & 6) + strip;
  unsigned select = one & 0x10000u ? 0x5410 : 0x3254;
#pragma unroll
  for (unsigned i = 0; i < 8 * HALVES; ++i)
    if (i == at) out[i] = __byte_perm(out[i], one, select);
}

template <int INLINE>
__forceinline__ __device__ void moec_own_start(unsigned* held, const void* header0,
                                               const void* header1, const void* pool,
                                               int* scratch) {
  int lane = threadIdx.x & 31;
  scratch[lane] = scratch[lane + 32] = -1;
  __syncwarp();
  const void* header = lane < 16 ? header0 : header1;
  int count = ((const int*)header)[2];
  for (int number = lane & 15; number < count; number += 16) {
    int* place = scratch + (lane & 16) * 2 + (moec_exception<INLINE>(header, pool, number).x >> 20);
    asm volatile("red.shared.max.s32 [%0], %1;"
                 :: "r"((unsigned)__cvta_generic_to_shared(place)), "r"(number) : "memory");
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    header = i ? header1 : header0;
    int number = scratch[i * 32 + lane];
    held[i] = 0xffffffffu;
    if (number >= 0) held[i] = moec_exception<INLINE>(header, pool, number).y << 16 | number;
  }
  held[2] = min(held[0], held[1]);
  __syncwarp();
}
template <int HALVES>
__forceinline__ __device__ unsigned moec_own_due(const unsigned* held, int half) {
  return __any_sync(0xffffffffu, held[2] < (half + HALVES) << 16);
}
template <int HALVES, int INLINE>
__forceinline__ __device__ void moec_own_put(unsigned* out, unsigned* held, const void* header0,
                                             const void* header1, const void* pool, int half) {
  unsigned due = half << 16;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const void* header = i ? header1 : header0;
    while (held[i] - due < HALVES << 16) {
      uint2 one = moec_exception<INLINE>(header, pool, held[i] & @NONE@);
      moec_patch<HALVES>(out, one.x, (held[i] - due) >> 16, i);
      unsigned next = one.y >> 16;
      held[i] = 0xffffffffu;
      if (next != @NONE@) held[i] = moec_exception<INLINE>(header, pool, next).y << 16 | next;
    }
  }
  held[2] = min(held[0], held[1]);
}

template <int INLINE>
__forceinline__ __device__ void moec_ask_start(unsigned* held, const void* header0,
                                               const void* header1, const void* pool) {
  unsigned lane = threadIdx.x & 31, number = lane & 15;
  const void* header = lane < 16 ? header0 : header1;
  uint2 one = make_uint2(0, 1 << 30);
  if (number < 14 && number < ((const unsigned*)header)[2]) {
    one = ((const uint2*)header)[2 + number];
    one.y &= @NONE@;
  }
  held[0] = one.x, held[1] = one.y;
  // Halves descend, so those that are not held are not behind the last one that is.
  int last0 = __shfl_sync(0xffffffffu, one.y, 13), last1 = __shfl_sync(0xffffffffu, one.y, 29);
  held[2] = max(((const int*)header0)[2] > 14 ? last0 : -1,
                ((const int*)header1)[2] > 14 ? last1 : -1);
}
template <int HALVES>
__forceinline__ __device__ unsigned moec_ask_due(const unsigned* held, int half) {
  return __ballot_sync(0xffffffffu, held[1] - half < HALVES) | ((int)held[2] >= half);
}
template <int HALVES>
__forceinline__ __device__ void moec_hand(unsigned* out, uint2 own, int half, int strip) {
  for (unsigned found = __ballot_sync(0xffffffffu, own.y - half < HALVES); found;
       found &= found - 1) {
    unsigned from = __ffs(found) - 1;
    unsigned one = __shfl_sync(0xffffffffu, own.x, from);
    unsigned there = __shfl_sync(0xffffffffu, own.y, from) - half;
    if (one >> 20 == (threadIdx.x & 31))
      moec_patch<HALVES>(out, one, there, strip < 0 ? from >> 4 : strip);
  }
}
template <int HALVES, int INLINE>
__forceinline__ __device__ void moec_ask_put(unsigned* out, unsigned* held, const void* header0,
                                             const void* header1, const void* pool, int half) {
  moec_hand<HALVES>(out, make_uint2(held[0], held[1]), half, -1);
  if ((int)held[2] < half) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const void* header = i ? header1 : header0;
    int count = ((const int*)header)[2];
    for (int base = 14; base < count; base += 32) {
      uint2 one = make_uint2(0, 1 << 30);
      int number = base + (threadIdx.x & 31);
      if (number < count) {
        one = moec_exception<INLINE>(header, pool, number);
        one.y &= @NONE@;
      }
      moec_hand<HALVES>(out, one, half, i);
    }
  }
}
#endif
""".replace("@HALF@", str(HALF)).replace("@NONE@", str(NONE))


@dataclass(frozen=True)
class Expansion:
    """How a warp expands two strips, so many halves (1 or 2) at a time.

    `inline`: exceptions that find room in a header.
    """

    inline: int
    halves: int
    rare: Rare

    def start(self, held: Any, headers: Any, pool: Any, *scratch: Any) -> Any:
        """Before the first units of two strips; OWN needs the warp's SCRATCH in shared memory.

        `pool`: the expert's exceptions without room.
        """
        name = f"moec_{self.rare.value}_start<{self.inline}>"
        return T.cuda.func_call(name, held, *headers, pool, *scratch, source_code=EXPAND)

    def table(self, table: Any, headers: Any) -> Any:
        """TABLE words of registers: the high bytes of the strips."""
        return T.cuda.func_call("moec_expand_table", table, *headers, source_code=EXPAND)

    def load(self, raw: Any, places: Any, strips: Any) -> Any:
        """RAW words of registers a half, of two units: so many bytes from `places` on."""
        name = f"moec_expand_load<{self.halves}>"
        return T.cuda.func_call(name, raw, *places, *strips, source_code=EXPAND)

    def due(self, held: Any, half: Any) -> Any:
        """Not 0 (uint32) if one of the halves from `half` on may have exceptions."""
        name = f"moec_{self.rare.value}_due<{self.halves}>"
        return T.cuda.func_call(name, held, half, source_code=EXPAND, return_type="uint32")

    def expand(self, out: Any, raw: Any, table: Any) -> Any:
        """What was loaded: the A side of 2 k16 steps a half. Exceptions are not there yet."""
        name = f"moec_expand<{self.halves}>"
        return T.cuda.func_call(name, out, raw, table, source_code=EXPAND)

    def put(self, out: Any, held: Any, headers: Any, pool: Any, half: Any) -> Any:
        """The exceptions of the halves from `half` on, where `due` says that there are any."""
        name = f"moec_{self.rare.value}_put<{self.halves}, {self.inline}>"
        return T.cuda.func_call(name, out, held, *headers, pool, half, source_code=EXPAND)


def place(packed: Any, bytes_a_lane: int) -> Any:
    """The address (uint32) in shared memory from which a lane loads so many bytes of a half."""
    return T.cuda.func_call(
        "moec_expand_place", packed, bytes_a_lane, source_code=EXPAND, return_type="uint32"
    )


def multiply_picked(widths: tuple[int, ...], steps: int) -> tuple[str, str]:
    """(name, source) of a group of wgmma at one of the widths: so many k16 steps, A in registers.

    f(float* sums, const unsigned* a, unsigned low, unsigned high, int keep, int pick): `a` has four
    words a step, `low` and `high` are the descriptor, keep = 0 clears the sums, `pick` is the place
    of the width, the same in all lanes. In a register of each lane, which ptxas does not take for a
    uniform one, a bit of it makes a predicate at once; from a uniform register a branch waits some
    12 cycles for its predicate (3 to 5 % of the time with many tokens).
    """
    count = widths[-1] // 2
    name = f"moec_wgmma{steps}_picked_" + "_".join(map(str, widths))
    after = count + 4 * steps  # the number of the first operand that follows `a`

    def group(width: int) -> list[str]:
        sums = ", ".join(f"%{i}" for i in range(width // 2))
        wgmma = f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.bf16.bf16 {{{sums}}},"
        lines = []
        for step in range(steps):
            a = ", ".join(f"%{count + 4 * step + i}" for i in range(4))
            lines.append(f"{wgmma} {{{a}}}, b{step}, {'t' if step else 'p'}, 1, 1, 0;")
        # Here, and not where the branches meet: there it would be a group of its own.
        return [*lines, "wgmma.commit_group.sync.aligned;"]

    def choose(low: int, bit: int) -> list[str]:
        if bit < 0:
            return [*group(widths[low]), "bra.uni END;"]
        high = low + (1 << bit)
        if high >= len(widths):
            return choose(low, bit - 1)
        label, there = f"W{high}_{bit}", choose(high, bit - 1)
        return [f"@q{bit} bra.uni {label};", *choose(low, bit - 1), f"{label}:", *there]

    bits = (len(widths) - 1).bit_length()
    lines = [
        "{ .reg .pred p, t; .reg .b32 low;",
        *(
            f".reg .pred q{bit}; and.b32 low, %{after + 3}, {1 << bit}; setp.ne.u32 q{bit}, low, 0;"
            for bit in range(bits)
        ),
        f"setp.ne.b32 p, %{after + 2}, 0; setp.ne.b32 t, 1, 0;",
        *(
            f".reg .b64 b{step}; add.u32 low, %{after}, {2 * step};"
            f" mov.b64 b{step}, {{low, %{after + 1}}};"
            for step in range(steps)
        ),
        *choose(0, bits - 1),
        "END: }",
    ]
    text = "\n".join(f'      "{line}\\n"' for line in lines)
    outs = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    ins = ", ".join(f'"r"(a[{i}])' for i in range(4 * steps))
    source = f"""
__forceinline__ __device__ void {name}(float* sums, const unsigned* a, unsigned low,
                                       unsigned high, int keep, int pick) {{
  asm volatile(
{text}
      : {outs}
      : {ins}, "r"(low), "r"(high), "r"(keep), "r"(pick));
}}
"""
    return name, source
