"""The emulator and the linter catch what is wrong in a kernel, and let right kernels through.

Every planted bug is a kernel that a CPU would run without complaint. What must catch it is
named: the linter, the emulator's compiler, a check at run time, or the comparison of orders.
"""

from __future__ import annotations

import numpy as np
import pytest

from tools.metal_emulator import ORDERS, LintError, MSLError, lint, run

HEAD = """#include <metal_stdlib>
using namespace metal;
kernel void k(device float* A [[ buffer(0) ]], device float* B [[ buffer(1) ]],
              uint blockIdx [[threadgroup_position_in_grid]],
              uint threadIdx [[thread_position_in_threadgroup]]) {
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
# name -> (body, grid, threads, which of the two catches it, words of its message)
BUGS = {
    "address spaces mixed": (
        "threadgroup float s[32]; device float* p = (device float*)s; B[threadIdx] = p[0];",
        1, 32, "lint", "address space",
    ),
    "address spaces mixed, seen by the emulator": (
        "threadgroup float s[32];\n device float* p = (device float*)s;\n B[threadIdx] = p[0];",
        1, 32, "run", "C\\+\\+ compiler rejects",
    ),
    "threadgroup memory in a nested scope": (
        "for (int i = 0; i < 2; ++i) { threadgroup float s[32]; s[threadIdx] = A[threadIdx]; }",
        1, 32, "lint", "local",
    ),
    "a word of MSL 3": ("bfloat v = bfloat(A[0]); B[0] = float(v);", 1, 32, "lint", "bfloat"),
    "double": ("B[0] = (double)A[0];", 1, 32, "lint", "double"),
    "a function that MSL does not have": ("B[0] = erf(A[0]);", 1, 32, "lint", "erf"),
    "a vector as a condition": (
        "float4 a = *(device float4*)A; if (a < a) { B[0] = 1.0f; }", 1, 32, "lint", "bool",
    ),
    "missing barrier": (
        "threadgroup float s[32];\n s[threadIdx] = A[threadIdx]; B[threadIdx] = s[31 - threadIdx];",
        1, 32, "run", "race in threadgroup memory",
    ),
    "missing barrier before memory is used again": (
        f"threadgroup float s[32];\n s[threadIdx] = A[threadIdx]; {BARRIER} "
        "float v = s[31 - threadIdx]; s[threadIdx] = v; B[threadIdx] = v;",
        1, 32, "run", "race in threadgroup memory",
    ),
    "a barrier that orders only device memory": (
        "threadgroup float s[32];\n s[threadIdx] = A[threadIdx];\n"
        "threadgroup_barrier(mem_flags::mem_device); B[threadIdx] = s[31 - threadIdx];",
        1, 32, "run", "race",
    ),
    "a SIMD-group barrier between SIMD groups": (
        "threadgroup float s[64];\n s[threadIdx] = A[threadIdx];\n"
        "simdgroup_barrier(mem_flags::mem_threadgroup); B[threadIdx] = s[63 - threadIdx];",
        1, 64, "run", "race",
    ),
    "a lane outside the SIMD group": (
        "B[threadIdx] = simd_shuffle(A[threadIdx] + 0.0f, threadIdx);", 1, 64, "run", "lane 32",
    ),
    "a read past the end of a buffer": (
        "B[threadIdx] = A[threadIdx + 40];", 1, 32, "run", "device read out of bounds",
    ),
    "a write past the end of threadgroup memory": (
        "threadgroup float s[32];\n s[threadIdx + 1] = A[threadIdx];",
        1, 32, "run", "threadgroup write out of bounds",
    ),
    "a grid without a guard": (
        "B[blockIdx * 32 + threadIdx] = 1.0f;", 3, 32, "run", "device write out of bounds",
    ),
    "a barrier in a divergent branch": (
        f"if (threadIdx < 16) {{ {BARRIER} }} B[threadIdx] = 1.0f;", 1, 32, "run", "divergence",
    ),
    "a SIMD-group operation in a divergent branch": (
        "if (threadIdx < 16) { B[threadIdx] = simd_sum(A[threadIdx] + 0.0f); }",
        1, 32, "run", "divergence",
    ),
    "different SIMD-group operations meet": (
        "float v = A[threadIdx]; if (threadIdx < 16) { v = simd_sum(v); } else { v = simd_max(v); }"
        "B[threadIdx] = v;",
        1, 32, "run", "simd_(sum|max) meets",
    ),
    "too much threadgroup memory": (
        "threadgroup float s[8200];\n s[threadIdx] = A[threadIdx];", 1, 32, "run", "32800 of 32768",
    ),
    "a misaligned vector load": (
        "float4 v = *(device float4*)(A + 1); B[threadIdx] = v.x;", 1, 32, "run", "not aligned",
    ),
    "two threadgroups write one element": (
        "B[threadIdx] = A[threadIdx];", 2, 32, "run", "race in device memory",
    ),
    "a threadgroup reads what another one writes": (
        "B[blockIdx * 32 + threadIdx] = 1.0f; float v = B[31 - threadIdx];"
        "A[blockIdx * 32 + threadIdx] = v;",
        2, 32, "run", "race in device memory",
    ),
    "a matrix load whose pointer differs in the SIMD group": (
        "threadgroup float s[128];\n s[threadIdx] = 0.0f; simdgroup_float8x8 m;"
        f"{BARRIER} simdgroup_load(m, s + threadIdx, 8, ulong2(0), false);",
        1, 32, "run", "pointer or stride differs",
    ),
    "a matrix load that not all threads of the SIMD group come to": (
        "threadgroup float s[64];\n s[threadIdx] = s[threadIdx + 32] = 0.0f; simdgroup_float8x8 m;"
        f"{BARRIER} if (threadIdx < 16) simdgroup_load(m, s, 8, ulong2(0), false);",
        1, 32, "run", "divergence: not all threads came to simdgroup_load",
    ),
    "a barrier that some threads reach after fewer matrix operations": (
        "threadgroup float s[64];\n s[threadIdx] = s[threadIdx + 32] = 0.0f; simdgroup_float8x8 m;"
        f"{BARRIER} if (threadIdx != 5) simdgroup_load(m, s, 8, ulong2(0), false); {BARRIER}",
        1, 32, "run", "divergence: not all threads came to simdgroup_load",
    ),
    "different matrix operations meet": (
        "threadgroup float s[64];\n s[threadIdx] = s[threadIdx + 32] = 0.0f;"
        f"simdgroup_float8x8 m = make_filled_simdgroup_matrix<float, 8, 8>(0.0f); {BARRIER}"
        "if (threadIdx < 16) { simdgroup_load(m, s, 8, ulong2(0), false); }"
        "else { simdgroup_store(m, s, 8, ulong2(0), false); }",
        1, 32, "run", "simdgroup_(load|store) meets",
    ),
    "a matrix load without a barrier, of what its own first thread wrote": (
        "threadgroup float s[64];\n if (threadIdx == 0) for (int i = 0; i < 64; ++i) s[i] = 0.0f;"
        "simdgroup_float8x8 m; simdgroup_load(m, s, 8, ulong2(0), false);",
        1, 32, "run", "race in threadgroup memory",
    ),
    "a result that is read before the matrix store is ordered": (
        "threadgroup float s[64];\n"
        "simdgroup_float8x8 m = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);"
        "simdgroup_store(m, s, 8, ulong2(0), false); B[threadIdx] = s[threadIdx];",
        1, 32, "run", "race in threadgroup memory",
    ),
    "a broadcast from different lanes": (
        "B[threadIdx] = simd_broadcast(A[threadIdx] + 0.0f, ushort(threadIdx % 2));",
        1, 32, "run", "source differs",
    ),
    "a broadcast in a divergent branch": (
        "if (threadIdx >= 16) B[threadIdx] = simd_broadcast(A[threadIdx] + 0.0f, ushort(0));",
        1, 32, "run", "divergence",
    ),
}  # fmt: skip


def execute(source: str, grid: int, threads: int) -> list[np.ndarray]:
    """The output of every order."""
    outputs = []
    for order in ORDERS:
        a, b = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
        run(source, [a, b], [grid], [threads], order)
        outputs.append(b)
    return outputs


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_caught(name: str) -> None:
    body, grid, threads, by, words = BUGS[name]
    source = f"{HEAD}{body}\n}}\n"
    if by == "lint":
        with pytest.raises(LintError, match=words):
            lint(source)
    else:
        with pytest.raises(MSLError, match=words):
            execute(source, grid, threads)


def test_memory_that_was_never_written_is_nan() -> None:
    body = "threadgroup float s[64];\n B[threadIdx] = s[threadIdx];"
    assert np.isnan(execute(f"{HEAD}{body}\n}}\n", 1, 32)[0][:32]).all()


def test_orders_disagree_on_a_race_through_device_memory() -> None:
    # Threads of one threadgroup all write one element: which value stays depends on the order.
    outputs = execute(f"{HEAD}B[0] = A[threadIdx];\n}}\n", 1, 32)
    assert len({out.tobytes() for out in outputs}) > 1


GOOD = {
    "reversal": (
        f"threadgroup float s[32];\n s[threadIdx] = A[threadIdx]; {BARRIER}"
        "B[threadIdx] = s[31 - threadIdx];",
        lambda a: np.concatenate([a[31::-1], np.zeros(32)]),
    ),
    "sum": (
        "B[threadIdx] = simd_sum(A[threadIdx] + 0.0f);",
        lambda a: np.concatenate([np.full(32, a[:32].sum()), np.zeros(32)]),
    ),
    "prefix": (
        "B[threadIdx] = simd_prefix_exclusive_sum(A[threadIdx] + 0.0f);",
        lambda a: np.concatenate([np.cumsum(a[:32]) - a[:32], np.zeros(32)]),
    ),
    "matrix": (
        "simdgroup_float8x8 a, b, c; c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);"
        "simdgroup_load(a, A, 8, ulong2(0), false); simdgroup_load(b, A, 8, ulong2(0), true);"
        "simdgroup_multiply_accumulate(c, a, b, c); simdgroup_store(c, B, 8, ulong2(0), false);",
        lambda a: (a.reshape(8, 8) @ a.reshape(8, 8).T).reshape(-1),
    ),
    "broadcast": (
        "B[threadIdx] = simd_broadcast(A[threadIdx] + 0.0f, ushort(7));",
        lambda a: np.concatenate([np.full(32, a[7]), np.zeros(32)]),
    ),
    "half": (
        "half h = half(A[threadIdx] + 0.0f); B[threadIdx] = float(h / 3.0h);",
        lambda a: np.concatenate([a[:32].astype(np.float16) / np.float16(3), np.zeros(32)]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_right_kernels_pass(name: str) -> None:
    body, reference = GOOD[name]
    source = f"{HEAD}{body}\n}}\n"
    lint(source)
    outputs = execute(source, 1, 32)
    np.testing.assert_array_equal(outputs[0], reference(np.arange(64, dtype=np.float32)))
    assert len({out.tobytes() for out in outputs}) == 1
