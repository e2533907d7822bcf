"""The device functions that expand compact weights, compiled for the host and run by 32 threads.

What they are given was packed by the artifact's own packer, and what they must give are the bits
that were packed. PTX is replaced statement by statement by what it does; a statement that the
table below does not have is an error.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.schedules.cuda import compact
from moec.schedules.cuda.expand import EXPAND, Expansion, Rare
from tests.schedules.test_cuda_compact import normal, packed

Array = np.ndarray[Any, Any]

# A warp: what lanes exchange goes by way of an array, between two barriers.
WARP = r"""
#include <pthread.h>
#include <string.h>
#define __forceinline__ inline
#define __device__
struct uint2 { unsigned x, y; };
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static int max(int a, int b) { return a > b ? a : b; }
static unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
static pthread_barrier_t all;
static unsigned lanes[32];
static char* shared;
static thread_local struct { unsigned x; } threadIdx;
static void __syncwarp() { pthread_barrier_wait(&all); }
static unsigned exchanged(unsigned value, int from) {
  lanes[threadIdx.x] = value;
  __syncwarp();
  unsigned result = 0;
  if (from < 0) { for (int i = 0; i < 32; ++i) result |= (unsigned)(lanes[i] != 0) << i; }
  else result = lanes[from & 31];
  __syncwarp();
  return result;
}
static unsigned __ballot_sync(unsigned, bool value) { return exchanged(value, -1); }
static int __any_sync(unsigned, bool value) { return exchanged(value, -1) != 0; }
static unsigned __shfl_sync(unsigned, unsigned value, int from) { return exchanged(value, from); }
static int __ffs(unsigned value) { return __builtin_ffs(value); }
template <typename T> static T __ldg(const T* place) { return *place; }
static unsigned __cvta_generic_to_shared(const void* place) {
  return (unsigned)((const char*)place - shared);
}
static unsigned __byte_perm(unsigned x, unsigned y, unsigned select) {
  unsigned long long both = (unsigned long long)y << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned one = select >> 4 * i & 15, byte = both >> 8 * (one & 7) & 255;
    if (one & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
static unsigned load(unsigned place) {
  unsigned value;
  memcpy(&value, shared + place, 4);
  return value;
}
static void most(unsigned place, int value) {
  int* at = (int*)(shared + place);
  for (int old = *at; old < value && !__sync_bool_compare_and_swap(at, old, value); old = *at) {}
}
"""
PTX = {
    "": lambda out, given: ";",
    "ld.shared.v2.u32 {%0, %1}, [%2];": lambda out, given: (
        f"{{ {out[0]} = load({given[0]}); {out[1]} = load({given[0]} + 4); }}"
    ),
    "ld.shared.u32 %0, [%1 + 256];": lambda out, given: f"{out[0]} = load({given[0]} + 256);",
    "red.shared.max.s32 [%0], %1;": lambda out, given: f"most({given[0]}, {given[1]});",
}
RUN = r"""
struct Given { const void* pool; unsigned* out; int bytes, header, halves, every, first; };
static const Given* given;
static void* lane_of(void* number) {
  threadIdx.x = (unsigned)(long)number;
  const Given& own = *given;
  char *one = shared, *two = shared + own.bytes;
  int* scratch = (int*)(shared + 2 * own.bytes);
  unsigned held[3], table[4], raw[6 * HALVES], out[8 * HALVES];
  unsigned low = moec_expand_place(one + own.header, 8);
  unsigned codes = moec_expand_place(one + own.header, 4);
  moec_expand_table(table, one, two);
  START;
  for (int half = 0; half < own.halves; half += HALVES) {
    if ((half >> 1) % own.every != own.first) continue;
    int bytes = half * HALF;
    moec_expand_load<HALVES>(raw, low, codes, bytes, bytes + own.bytes);
    unsigned some = DUE;
    moec_expand<HALVES>(out, raw, table);
    if (some) PUT;
    for (int i = 0; i < HALVES; ++i)
      memcpy(own.out + ((half + i) * 32 + threadIdx.x) * 8, out + i * 8, 32);
  }
  return 0;
}
extern "C" void run(char* memory, const void* pool, unsigned* out, int bytes, int header,
                    int halves, int every, int first) {
  Given own = {pool, out, bytes, header, halves, every, first};
  given = &own, shared = memory;
  pthread_barrier_init(&all, 0, 32);
  pthread_t threads[32];
  for (long i = 0; i < 32; ++i) pthread_create(threads + i, 0, lane_of, (void*)i);
  for (int i = 0; i < 32; ++i) pthread_join(threads[i], 0);
  pthread_barrier_destroy(&all);
}
"""
_STATEMENT = re.compile(r'asm volatile\("([^"]*)"\s*:(.*?)\);', re.DOTALL)
_OPERAND = re.compile(r'"[=+]?r"\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)')


def replaced(match: re.Match[str]) -> str:
    """C++ for a statement of PTX."""
    text, operands = match[1], match[2].split(":")
    parts = [_OPERAND.findall(part) for part in operands]
    return PTX[text](parts[0], parts[1] if len(parts) > 1 else [])


def library(folder: Path, expansion: Expansion) -> Any:
    """The functions for one way to expand, compiled."""
    own = f"moec_{expansion.rare.value}"
    scratch = ", scratch" if expansion.rare is Rare.OWN else ""
    calls = {
        "START": f"{own}_start<{expansion.inline}>(held, one, two, own.pool{scratch})",
        "DUE": f"{own}_due<{expansion.halves}>(held, half)",
        "PUT": f"{own}_put<{expansion.halves}, {expansion.inline}>"
               "(out, held, one, two, own.pool, half)",
        "HALVES": str(expansion.halves),
        "HALF": str(compact.HALF),
    }  # fmt: skip
    run = re.sub(r"\b(START|DUE|PUT)\b", lambda m: calls[m[0]], RUN)
    run = re.sub(r"\b(HALVES|HALF)\b", lambda m: calls[m[0]], run)
    source, path = folder / "warp.cc", folder / "warp.so"
    source.write_text(WARP + _STATEMENT.sub(replaced, EXPAND) + run)
    flags = ["-O1", "-shared", "-fPIC", "-nostdlib++", "-fno-exceptions", "-fno-rtti"]
    command = [sys.executable, "-m", "ziglang", "c++", *flags, "-o", str(path), str(source)]
    made = subprocess.run([*command, "-lpthread"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[:2000]
    return ctypes.CDLL(str(path)).run


def weights(inner: int, kind: str) -> Array:
    """[16, inner] of bits: two strips, and what is no frequent high byte in them."""
    bits = normal(16, inner, seed=inner)
    random = np.random.default_rng(inner)
    if kind == "none":
        bits = bits & 0x00FF | 0x3F00
    if kind == "many":  # more than find room in the headers, several a lane and half
        columns = np.linspace(7, inner - 2, compact.Layout(1, 16, inner).inline + 8).astype(int)
        bits[3, columns] = 0x0100 * random.integers(1, 40, len(columns))
        bits[12, 32:40] = 0x0123 + 0x0100 * np.arange(8)
        bits[12, inner - 8 :] = 0x8123 + 0x0100 * np.arange(8)
    return bits


@pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="there is no ziglang")
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("rare", Rare)
@pytest.mark.parametrize("inner", [256, 4224])
def test_every_bit_comes_back(tmp_path: Path, inner: int, rare: Rare, halves: int) -> None:
    layout = compact.Layout(1, 16, inner)
    run = library(tmp_path, Expansion(layout.inline, halves, rare))
    for kind in ("none", "few", "many"):
        bits = weights(inner, kind)
        words = packed(bits, False)
        strips = 2 * layout.strip_bytes
        memory = np.zeros(strips + 256, np.uint8)  # and what lanes need to find their first ones
        memory[:strips] = words.view(np.uint8)[:strips]
        pool = words.view(np.uint8)[strips:].copy()
        counts = memory[:strips].reshape(2, -1)[:, 8:12].copy().view(np.int32)
        assert kind != "none" or (counts == 0).all()
        assert kind != "many" or counts[0] > layout.inline
        for every in (1, 3) if rare is Rare.ASK else (1,):
            out = np.full((inner // 32, 32, 8), 0xFFFFFFFF, np.uint32)
            for first in range(every):
                run(memory.ctypes.data_as(ctypes.c_void_p), pool.ctypes.data_as(ctypes.c_void_p),
                    out.ctypes.data_as(ctypes.c_void_p), layout.strip_bytes, layout.header,
                    inner // 32, every, first)  # fmt: skip
            # lane 4 g + q, word 4 s + 2 j + f, part i: row g of strip f, its column
            # 16 s + 8 j + 2 q + i
            parts = out.view(np.uint16).reshape(inner // 32, 8, 4, 2, 2, 2, 2)
            got = parts.transpose(5, 1, 0, 3, 4, 2, 6).reshape(16, inner)
            np.testing.assert_array_equal(got, bits, err_msg=f"{kind}, one of {every} units")
