"""Device functions in CUDA C++ that TIRx has no spelling for, as sources.

A source that defines more than one function guards itself: it is emitted once a function.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

# T.cuda.mbarrier_wait loops with `bra.uni`, which is undefined for a warp whose lanes see
# different results of try_wait; this loop converges by itself.
_BARRIER_WAIT = r"""
__forceinline__ __device__ void moec_barrier_wait(void* barrier, int parity) {
  unsigned place = (unsigned)__cvta_generic_to_shared(barrier), done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(place), "r"(parity) : "memory");
  } while (!done);
}
"""
# By a predicate: with a branch around the loop, the loop that it is in ends with two of them.
_BARRIER_WAIT_UNLESS = r"""
__forceinline__ __device__ void moec_barrier_wait_unless(int skip, void* barrier, int parity) {
  unsigned place = (unsigned)__cvta_generic_to_shared(barrier), done;
  do {
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %3, 0;"
        " @!p mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(place), "r"(parity), "r"(skip) : "memory");
  } while (!done);
}
"""


def wait(barrier: Any, parity: Any) -> Any:
    """Until the phase of this parity of an mbarrier is complete."""
    return T.cuda.func_call("moec_barrier_wait", barrier, parity, source_code=_BARRIER_WAIT)


def wait_unless(skip: Any, barrier: Any, parity: Any) -> Any:
    """The same, but not at all if `skip` (int32) is not 0."""
    name = "moec_barrier_wait_unless"
    return T.cuda.func_call(name, skip, barrier, parity, source_code=_BARRIER_WAIT_UNLESS)


# T.cuda.cluster_sync says nothing to the compiler about memory: stores could move behind it.
CLUSTER_SYNC = """
__forceinline__ __device__ void moec_cluster_sync() {
  __syncwarp();
  asm volatile(
      "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
"""

# 16 bytes from global memory, the `index`-th behind `from`, to shared memory; of the second,
# `bytes`, then zeros.
COPY16 = r"""
#ifndef MOEC_COPY16
#define MOEC_COPY16
__forceinline__ __device__ unsigned long long moec_global(const void* place) {
  return (unsigned long long)__cvta_generic_to_global(place);
}
__forceinline__ __device__ unsigned moec_shared(const void* place) {
  return (unsigned)__cvta_generic_to_shared(place);
}
__forceinline__ __device__ void moec_copy16(unsigned to, unsigned long long from, unsigned index) {
  asm volatile("{ .reg .b64 place; mad.wide.u32 place, %2, 16, %1;"
               " cp.async.cg.shared.global.L2::128B [%0], [place], 16; }"
               :: "r"(to), "l"(from), "r"(index) : "memory");
}
__forceinline__ __device__ void moec_copy_part(unsigned to, unsigned long long from,
                                               unsigned index, int bytes) {
  asm volatile("{ .reg .b64 place; mad.wide.u32 place, %2, 16, %1;"
               " cp.async.cg.shared.global.L2::128B [%0], [place], 16, %3; }"
               :: "r"(to), "l"(from), "r"(index), "r"(bytes) : "memory");
}
#endif
"""

# 16 bytes to row `row` of `bytes` each from `to` on, if `valid`.
STORE16 = r"""
__forceinline__ __device__ void moec_store16(unsigned long long to, int row, int bytes,
                                             const unsigned* v, int valid) {
  asm volatile("{ .reg .pred p; .reg .b64 place; setp.ne.s32 p, %7, 0;"
               " mad.wide.s32 place, %1, %2, %0; @p st.global.v4.b32 [place], {%3, %4, %5, %6}; }"
               :: "l"(to), "r"(row), "r"(bytes), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]),
                  "r"(valid) : "memory");
}
"""

# The next number of a counter in global memory.
CLAIM = r"""
__forceinline__ __device__ int moec_claim(int* counter) { return atomicAdd(counter, 1); }
"""

# An integer in the shared memory of another block of the cluster, at the place of one's own.
CLUSTER_LOAD = r"""
__forceinline__ __device__ int moec_cluster_load(const void* own, int rank) {
  unsigned place = (unsigned)__cvta_generic_to_shared(own);
  int value;
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %1, %2;"
      " ld.shared::cluster.u32 %0, [there]; }"
      : "=r"(value) : "r"(place), "r"(rank) : "memory");
  return value;
}
"""


def match(bits: int) -> tuple[str, str]:
    """(name, source): the lanes of the warp that hold the same value of so many bits.

    One ballot a bit: __match_any_sync takes a step for every distinct value, about 1 us for 32.
    """
    name = f"moec_match{bits}"
    source = f"""
__forceinline__ __device__ unsigned {name}(int value) {{
  unsigned same = 0xffffffffu;
#pragma unroll
  for (int bit = 0; bit < {bits}; ++bit) {{
    bool one = (value >> bit) & 1;
    unsigned ones = __ballot_sync(0xffffffffu, one);
    same &= one ? ones : ~ones;
  }}
  return same;
}}
"""
    return name, source


LOAD_CG = r"""
#ifndef MOEC_LOAD_CG
#define MOEC_LOAD_CG
__forceinline__ __device__ int moec_load_int(const void* place) {
  return __ldcg((const int*)place);
}
__forceinline__ __device__ float moec_load_float(const void* place) {
  return __ldcg((const float*)place);
}
#endif
"""


def fresh(buffer: Any, index: Any, dtype: str = "int32") -> Any:
    """A value (int32, float32) that an earlier kernel wrote, read past the L1.

    The compiler turns reads of what a kernel never writes into loads of the read-only path,
    which may be stale when kernels overlap by programmatic dependent launch.
    """
    name = "moec_load_int" if dtype == "int32" else "moec_load_float"
    return T.cuda.func_call(name, buffer.ptr_to([index]), source_code=LOAD_CG, return_type=dtype)


_ROUND = r"""
#ifndef MOEC_ROUND
#define MOEC_ROUND
#include <cuda_bf16.h>
#include <cuda_fp16.h>
__forceinline__ __device__ float moec_round_bfloat16(float v) {
  return __bfloat162float(__float2bfloat16_rn(v));
}
__forceinline__ __device__ float moec_round_float16(float v) {
  return __half2float(__float2half_rn(v));
}
#endif
"""


def round_to(value: Any, dtype: str) -> Any:
    """A float32 rounded to what `dtype` holds, as float32."""
    if dtype == "float32":
        return value
    name = f"moec_round_{dtype}"
    return T.cuda.func_call(name, value, source_code=_ROUND, return_type="float32")


# Eight consecutive values at a 16-byte aligned place, to float32.
UNPACK = r"""
#ifndef MOEC_UNPACK
#define MOEC_UNPACK
#include <cuda_bf16.h>
#include <cuda_fp16.h>
__forceinline__ __device__ void moec_load8(float* out, const __nv_bfloat16* place) {
  uint4 raw = __ldcg((const uint4*)place);
  const __nv_bfloat162* pair = (const __nv_bfloat162*)&raw;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 two = __bfloat1622float2(pair[i]);
    out[2 * i] = two.x, out[2 * i + 1] = two.y;
  }
}
__forceinline__ __device__ void moec_load8(float* out, const __half* place) {
  uint4 raw = __ldcg((const uint4*)place);
  const __half2* pair = (const __half2*)&raw;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 two = __half22float2(pair[i]);
    out[2 * i] = two.x, out[2 * i + 1] = two.y;
  }
}
__forceinline__ __device__ void moec_load8(float* out, const float* place) {
  float4 a = __ldcg((const float4*)place), b = __ldcg((const float4*)place + 1);
  out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
  out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}
__forceinline__ __device__ void moec_unpack8_bfloat16(float* out, const unsigned* raw) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(raw[i] << 16);
    out[2 * i + 1] = __uint_as_float(raw[i] & 0xffff0000u);
  }
}
__forceinline__ __device__ void moec_unpack8_float16(float* out, const unsigned* raw) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 two = __half22float2(*(const __half2*)&raw[i]);
    out[2 * i] = two.x, out[2 * i + 1] = two.y;
  }
}
__forceinline__ __device__ void moec_unpack8_float32(float* out, const unsigned* raw) {
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = __uint_as_float(raw[i]);
}
__forceinline__ __device__ void moec_store8(__nv_bfloat16* place, const float* in) {
  __nv_bfloat162 pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pair[i] = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
  *(uint4*)place = *(const uint4*)pair;
}
__forceinline__ __device__ void moec_store8(__half* place, const float* in) {
  __half2 pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pair[i] = __floats2half2_rn(in[2 * i], in[2 * i + 1]);
  *(uint4*)place = *(const uint4*)pair;
}
__forceinline__ __device__ void moec_store8(float* place, const float* in) {
  ((float4*)place)[0] = make_float4(in[0], in[1], in[2], in[3]);
  ((float4*)place)[1] = make_float4(in[4], in[5], in[6], in[7]);
}
#endif
"""


def load8(values: Any, place: Any) -> Any:
    """Read 8 values (f32, bf16, f16) at a 16-byte aligned place into f32 locals at `values`."""
    return T.cuda.func_call("moec_load8", values, place, source_code=UNPACK)


def unpack8(values: Any, raw: Any, dtype: str) -> Any:
    """8 values of `dtype` in the 32-bit words at `raw` to the f32 locals at `values`."""
    return T.cuda.func_call(f"moec_unpack8_{dtype}", values, raw, source_code=UNPACK)


def store8(place: Any, values: Any) -> Any:
    """Round the 8 f32 locals at `values` to the type of `place`, 16-byte aligned, and store."""
    return T.cuda.func_call("moec_store8", place, values, source_code=UNPACK)


LOAD_ONE = r"""
#ifndef MOEC_LOAD_ONE
#define MOEC_LOAD_ONE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
__forceinline__ __device__ float moec_load_one(const __nv_bfloat16* place) {
  return __bfloat162float(__ldcg(place));
}
__forceinline__ __device__ float moec_load_one(const __half* place) {
  return __half2float(__ldcg(place));
}
__forceinline__ __device__ float moec_load_one(const float* place) { return __ldcg(place); }
#endif
"""

# A constant that the compiler does not see through. A loop over wgmma that runs two or three
# times would be unrolled, and then ptxas lacks the registers to keep it asynchronous.
_OPAQUE = r"""
__forceinline__ __device__ int moec_opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
"""


def opaque(value: Any) -> Any:
    """`value` as a run-time int32."""
    return T.cuda.func_call("moec_opaque", value, source_code=_OPAQUE, return_type="int32")


SHARED_ADD = r"""
__forceinline__ __device__ void moec_add(int* place, int value) { atomicAdd(place, value); }
"""
