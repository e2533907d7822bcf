"""What a CPU instruction set offers to the kernels, as declared values.

A register tile is `rows` x `vectors` vectors of `lanes` float32 accumulators. The sizes
leave room for the weight vectors and one broadcast activation in the register file: a tile
that spills is several times slower, silently.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Isa:
    """One instruction set: vector width, register tile, and the special instructions used.

    `registers` are the vector registers, as LLVM's inline assembly names them, and how many.
    `mcpu` and `mattr` make LLVM emit this set and no more. `features` are the CPU flags (names
    as in /proc/cpuinfo) without which the code would die of an illegal instruction; the
    artifact requires them of the machine that loads it. `byte_lookup` is the lookup of bytes in
    a table of 16 that the compact form of panels wants.
    """

    name: str
    lanes: int
    vectors: int
    rows: int
    fma: bool
    bf16_dot: bool
    byte_lookup: bool
    registers: tuple[str, int]
    mcpu: str
    mattr: tuple[str, ...]
    features: tuple[str, ...]

    @property
    def panel(self) -> int:
        """Output columns of one weight panel: the width of the register tile."""
        return self.lanes * self.vectors

    @property
    def half(self) -> int:
        """Columns of a panel that are gate (the other half is up) in a gated projection."""
        return self.panel // 2


# The x86-64-v3 and -v4 levels of the psABI, as far as Linux shows them as flags.
_V3 = ("avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe", "popcnt")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

# 32 registers of 16 lanes: 6 x 4 accumulators + 4 weights + 1 broadcast.
AVX512_BF16 = Isa(
    "avx512-bf16",
    16,
    4,
    6,
    True,
    True,
    True,
    ("xmm", 32),
    "x86-64-v4",
    ("+avx512bf16",),
    (*_V4, "avx512_bf16"),
)
AVX512 = Isa("avx512", 16, 4, 6, True, False, True, ("xmm", 32), "x86-64-v4", (), _V4)
# 16 registers of 8 lanes: 6 x 2 accumulators + 2 weights + 1 broadcast.
AVX2 = Isa("avx2", 8, 2, 6, True, False, False, ("xmm", 16), "x86-64-v3", (), _V3)
# Baseline x86-64 has neither FMA nor 8 lanes: a tile that any compiler can place.
SSE2 = Isa("sse2", 4, 2, 4, False, False, False, ("xmm", 16), "x86-64", (), ("sse2",))
# 32 registers of 4 lanes; fused multiply-add is part of the base architecture.
NEON = Isa("neon", 4, 4, 6, True, False, False, ("v", 32), "generic", (), ("asimd",))
# FEAT_BF16, which every core of Armv8.6 and later has: bfdot is AVX512-BF16's dot in 4 lanes.
NEON_BF16 = Isa(
    "neon-bf16", 4, 4, 6, True, True, False, ("v", 32), "generic", ("+bf16",), ("asimd", "bf16")
)

ISAS = {isa.name: isa for isa in (AVX512_BF16, AVX512, AVX2, SSE2, NEON_BF16, NEON)}
