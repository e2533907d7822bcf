"""bfloat16 weights of experts in 12 bits: the form in memory, and how kernels read it.

The exponents of trained weights hold some 2.6 of their 8 bits (https://arxiv.org/abs/2504.11651),
so that of the 128 high bytes (sign aside: the exponent but for its last bit) eight are enough for
all but a few weights. A weight is its low byte as it is, its sign, and three bits that name one of
the eight high bytes which occur most in its strip. Any other weight is written down whole, beside.

    packed  [E, expert_bytes / 4] int32
    expert  strips of 8 weight rows, of a gated weight gate and up rows in turn (8 gate rows, the 8
            up rows that belong to them, the next gate rows); then the exceptions of the expert that
            found no room in their strips
    strip   HEADER bytes, then a unit of UNIT bytes for each 64 columns
    header  8 high bytes; int32 count of exceptions; int32 place of the ones without room;
            INLINE exceptions, those that are none with half NONE
    unit    two halves, of 32 columns each
    half    [32 lanes, 8] low bytes, then [32 lanes] words of signs and codes
    exception  int32: the weight's bits, its place in the lane << 16, the lane << 20; int32: the
            number of its half in the strip

Lane 4 g + q has the weights of row g that it needs for mma and wgmma: place 4 s + 2 j + i is column
16 s + 8 j + 2 q + i of the half. Place p has its code in bits 4 p to 4 p + 2; its sign is bit
8 p + 7 where p < 4, and bit 8 (p - 4) + 3 elsewhere. Exceptions are in ascending order of halves.
In place of one is code 0.

Expanded weights are the bits that were packed: where tiles add up in the same order, results are
those of plain weights bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

STRIP, COLUMNS = 8, 64  # rows of a strip, columns of a unit
UNIT, HALF, HEADER, INLINE = 768, 384, 128, 14
NONE = 1 << 30
HELD = 3  # words
EXCEPTION = 8  # bytes
_LINE = 128  # of the L2; an expert is whole ones
_RARE = 1024  # of so many weights one may be an exception that finds no room in its strip


@dataclass(frozen=True)
class Layout:
    """The packed form of a weight [experts, rows, inner]; 8 divides rows, 64 inner."""

    experts: int
    rows: int
    inner: int

    @property
    def strips(self) -> int:
        """Strips of an expert."""
        return self.rows // STRIP

    @property
    def units(self) -> int:
        """Units of a strip."""
        return self.inner // COLUMNS

    @property
    def strip_bytes(self) -> int:
        """Bytes from a strip to the next."""
        return HEADER + self.units * UNIT

    @property
    def spare(self) -> int:
        """Exceptions of an expert for which there is room behind its strips."""
        return -(-self.rows * self.inner // _RARE // (_LINE // EXCEPTION)) * (_LINE // EXCEPTION)

    @property
    def expert_bytes(self) -> int:
        """Bytes from an expert to the next."""
        return self.strips * self.strip_bytes + self.spare * EXCEPTION

    @property
    def shape(self) -> tuple[int, int]:
        """The packed parameter, int32."""
        return self.experts, self.expert_bytes // 4


def headers_kept(stages: int, boxes: int) -> int:
    """Whose headers are kept: of each that may have a box in a ring of so many, and of one more.

    `boxes`: how many boxes those that share a header have at least.
    """
    return 2 + -(-stages // boxes)


# Headers and units are in shared memory, `pool` has the expert's exceptions without room. Lanes 0
# to 13 hold the exceptions in the header of a first strip, 16 to 29 those of a second, and look at
# once whether one of them is in the half at hand: a warp that went through them in turn was late.
EXPAND = (
    r"""
#ifndef MOEC_EXPAND
#define MOEC_EXPAND
__forceinline__ __device__ void moec_expand_start(unsigned* held, const void* header0,
                                                  const void* header1) {
  unsigned lane = threadIdx.x & 31, number = lane & 15;
  const char* own = (const char*)(lane < 16 ? header0 : header1);
  uint2 one = make_uint2(0, @NONE@);
  if (number < @INLINE@) one = ((const uint2*)(own + 16))[number];
  held[0] = one.x, held[1] = one.y;
  // Exceptions ascend, so those that are elsewhere are not before the last one here.
  unsigned more0 = ((const int*)header0)[2] > @INLINE@, more1 = ((const int*)header1)[2] > @INLINE@;
  unsigned last0 = __shfl_sync(0xffffffffu, one.y, @INLINE@ - 1);
  unsigned last1 = __shfl_sync(0xffffffffu, one.y, 16 + @INLINE@ - 1);
  held[2] = min(more0 ? last0 : @NONE@, more1 ? last1 : @NONE@);
}
// Not zero if one of the halves [first, first + count) may have exceptions.
__forceinline__ __device__ unsigned moec_expand_rare(const unsigned* held, int first,
                                                     unsigned count) {
  return __ballot_sync(0xffffffffu, held[1] - first < count) | (held[2] < first + count);
}
template <int HALVES>
__forceinline__ __device__ void moec_patch(unsigned* out, unsigned found, unsigned own,
                                           unsigned half, unsigned first, int strip) {
  for (; found; found &= found - 1) {
    unsigned from = __ffs(found) - 1, strip_of = strip < 0 ? from >> 4 : strip;
    unsigned one = __shfl_sync(0xffffffffu, own, from);
    unsigned at = (__shfl_sync(0xffffffffu, half, from) - first) * 8 + (one >> 16 & 6) + strip_of;
    if (one >> 20 == (threadIdx.x & 31)) {
#pragma unroll
      for (unsigned i = 0; i < 8 * HALVES; ++i)
        if (i == at)
          out[i] = one & 0x10000u ? (out[i] & 0xffffu) | one << 16
                                  : (out[i] & 0xffff0000u) | (one & 0xffffu);
    }
  }
}
template <int HALVES>
__forceinline__ __device__ void moec_search(unsigned* out, unsigned half, const void* header,
                                            const void* pool, int strip) {
  int count = ((const int*)header)[2] - @INLINE@;
  const uint2* rest = (const uint2*)pool + ((const int*)header)[3];
  for (int base = 0; base < count; base += 32) {
    uint2 one = make_uint2(0, @NONE@);
    int number = base + (threadIdx.x & 31);
    if (number < count) one = __ldg(rest + number);
    unsigned found = __ballot_sync(0xffffffffu, one.y - half < HALVES);
    moec_patch<HALVES>(out, found, one.x, one.y, half, strip);
  }
}
template <int HALVES>
__forceinline__ __device__ void moec_expand(unsigned* out, const unsigned* held,
                                            const void* packed0, const void* packed1,
                                            const void* header0, const void* header1,
                                            const void* pool, int half, unsigned rare) {
  const char* heads[2] = {(const char*)header0, (const char*)header1};
  const char* units[2] = {(const char*)packed0, (const char*)packed1};
  unsigned lane = threadIdx.x & 31;
  uint2 table[2], low[2 * HALVES];
  unsigned codes[2 * HALVES];
#pragma unroll
  for (int i = 0; i < 2; ++i) table[i] = *(const uint2*)heads[i];
#pragma unroll
  for (int i = 0; i < 2 * HALVES; ++i) {
    low[i] = ((const uint2*)(units[i & 1] + (i >> 1) * @HALF@))[lane];
    codes[i] = ((const unsigned*)(units[i & 1] + (i >> 1) * @HALF@ + 256))[lane];
  }
#pragma unroll
  for (int i = 0; i < 2 * HALVES; ++i) {
    uint2 t = table[i & 1];
    unsigned named = codes[i] & 0x77777777u;
    unsigned even = __byte_perm(t.x, t.y, named) | (codes[i] & 0x80808080u);
    unsigned odd = __byte_perm(t.x, t.y, named >> 16) | ((codes[i] << 4) & 0x80808080u);
    unsigned* own = out + (i >> 1) * 8 + (i & 1);
    own[0] = __byte_perm(low[i].x, even, 0x5140);
    own[2] = __byte_perm(low[i].x, even, 0x7362);
    own[4] = __byte_perm(low[i].y, odd, 0x5140);
    own[6] = __byte_perm(low[i].y, odd, 0x7362);
  }
  if (__builtin_expect(rare, 0)) {
    unsigned found = __ballot_sync(0xffffffffu, held[1] - half < HALVES);
    moec_patch<HALVES>(out, found, held[0], held[1], half, -1);
    if (held[2] < half + HALVES) {
      moec_search<HALVES>(out, half, header0, pool, 0);
      moec_search<HALVES>(out, half, header1, pool, 1);
    }
  }
}
#endif
""".replace("@INLINE@", str(INLINE))
    .replace("@HALF@", str(HALF))
    .replace("@NONE@", str(NONE))
)


def start(held: Any, headers: Any) -> Any:
    """Before the first units of two strips: HELD words of a warp's registers."""
    return T.cuda.func_call("moec_expand_start", held, *headers, source_code=EXPAND)


def rare(held: Any, first: Any, count: int) -> Any:
    """Not 0 (uint32) if one of `count` halves may have exceptions."""
    return T.cuda.func_call(
        "moec_expand_rare", held, first, count, source_code=EXPAND, return_type="uint32"
    )


def expand(
    halves: int, out: Any, held: Any, packed: Any, headers: Any, pool: Any, half: Any, some: Any
) -> Any:
    """A lane's weights of 1 or 2 halves of a unit, of two strips: the A side of 2 k16 steps each.

    `some`: what `rare` says of these halves, or of more.
    """
    name = f"moec_expand<{halves}>"
    operands = (out, held, *packed, *headers, pool, half, some)
    return T.cuda.func_call(name, *operands, source_code=EXPAND)


def multiply_picked(widths: tuple[int, ...], steps: int) -> tuple[str, str]:
    """(name, source) of a group of wgmma at one of the widths: so many k16 steps, A in registers.

    f(float* sums, const unsigned* a, unsigned low, unsigned high, int keep, int pick): `a` has four
    words a step, `low` and `high` are the descriptor, keep = 0 clears the sums, `pick` is the place
    of the width.
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

    def choose(low: int, high: int) -> list[str]:
        if high - low == 1:
            return [*group(widths[low]), "bra.uni END;"]
        middle = (low + high) // 2
        label = f"W{low}_{high}"
        test = f"setp.lt.u32 q, %{after + 3}, {middle}; @q bra.uni {label};"
        return [test, *choose(middle, high), f"{label}:", *choose(low, middle)]

    lines = [
        "{ .reg .pred p, q, t; .reg .b32 low;",
        f"setp.ne.b32 p, %{after + 2}, 0; setp.ne.b32 t, 1, 0;",
        *(
            f".reg .b64 b{step}; add.u32 low, %{after}, {2 * step};"
            f" mov.b64 b{step}, {{low, %{after + 1}}};"
            for step in range(steps)
        ),
        *choose(0, len(widths)),
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
