"""LLVM helpers that kernels import: instructions and barriers that TIR cannot spell."""

from __future__ import annotations

from .isa import Isa

# TIR has no <32 x bfloat>. By the lanes of the instruction set that has them.
_BF16_LLVM = {
    16: """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
define <16 x float> @moec_dpbf16(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) \
alwaysinline nounwind {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %c, \
<32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
define <16 x i16> @moec_cvtbf16(<16 x float> %a) alwaysinline nounwind {
  %b = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %a)
  %r = bitcast <16 x bfloat> %b to <16 x i16>
  ret <16 x i16> %r
}
""",
    4: """
declare <4 x float> @llvm.aarch64.neon.bfdot.v4f32.v8bf16(<4 x float>, <8 x bfloat>, <8 x bfloat>)
define <4 x float> @moec_dpbf16(<4 x float> %c, <4 x i32> %a, <4 x i32> %b) \
alwaysinline nounwind {
  %x = bitcast <4 x i32> %a to <8 x bfloat>
  %y = bitcast <4 x i32> %b to <8 x bfloat>
  %r = call <4 x float> @llvm.aarch64.neon.bfdot.v4f32.v8bf16(<4 x float> %c, \
<8 x bfloat> %x, <8 x bfloat> %y)
  ret <4 x float> %r
}
define <4 x i16> @moec_cvtbf16(<4 x float> %a) alwaysinline nounwind {
  %b = fptrunc <4 x float> %a to <4 x bfloat>
  %r = bitcast <4 x bfloat> %b to <4 x i16>
  ret <4 x i16> %r
}
""",
}

# Every vector register counts as overwritten by the first, so no value stays in one across it;
# no load moves across the second.
_RELEASE_LLVM = """
define void @moec_release_registers() alwaysinline nounwind {{
  call void asm sideeffect "", "{clobbers}"()
  ret void
}}
define void @moec_keep_order() alwaysinline nounwind {{
  call void asm sideeffect "", "~{{memory}}"()
  ret void
}}
"""

# The lookup of 16 bytes by four bits each, in every 16 bytes of a vector of AVX-512.
_FIFTEENS = ", ".join(["i32 252645135"] * 16)
_BYTES_LLVM = f"""
declare <64 x i8> @llvm.x86.avx512.pshuf.b.512(<64 x i8>, <64 x i8>)
define <16 x i32> @moec_high_bytes(<16 x i32> %table, <16 x i32> %codes) alwaysinline nounwind {{
  %mine = and <16 x i32> %codes, <{_FIFTEENS}>
  %t = bitcast <16 x i32> %table to <64 x i8>
  %c = bitcast <16 x i32> %mine to <64 x i8>
  %b = call <64 x i8> @llvm.x86.avx512.pshuf.b.512(<64 x i8> %t, <64 x i8> %c)
  %r = bitcast <64 x i8> %b to <16 x i32>
  ret <16 x i32> %r
}}
"""


def helpers(isa: Isa) -> str:
    """LLVM IR of what kernels for an instruction set call."""
    name, count = isa.registers
    clobbers = ",".join(f"~{{{name}{i}}}" for i in range(count))
    text = _RELEASE_LLVM.format(clobbers=clobbers)
    if isa.bf16_dot:
        text += _BF16_LLVM[isa.lanes]
    if isa.byte_lookup:
        text += _BYTES_LLVM + _join("moec_join_low", 0) + _join("moec_join_high", 8)
    return text


def _join(name: str, first: int) -> str:
    """16-bit values of their bytes: of each 16 bytes the 8 from `first` on (vpunpcklbw, -hbw)."""
    places = [
        byte + of
        for lane in range(0, 64, 16)
        for byte in range(lane + first, lane + first + 8)
        for of in (0, 64)
    ]
    mask = ", ".join(f"i32 {place}" for place in places)
    return f"""
define <16 x i32> @{name}(<16 x i32> %low, <16 x i32> %high) alwaysinline nounwind {{
  %a = bitcast <16 x i32> %low to <64 x i8>
  %b = bitcast <16 x i32> %high to <64 x i8>
  %c = shufflevector <64 x i8> %a, <64 x i8> %b, <64 x i32> <{mask}>
  %r = bitcast <64 x i8> %c to <16 x i32>
  ret <16 x i32> %r
}}
"""
