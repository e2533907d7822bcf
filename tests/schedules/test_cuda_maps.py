"""Tensor maps of weights as C keeps them: what the driver is asked for, and how often."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

from moec.schedules import calls
from moec.schedules.cuda import maps
from moec.schedules.cuda.boxes import row_box
from moec.schedules.cuda.shapes import Matmul

# A driver that prints what it gets (of addresses the last six bits), writes a number into the map,
# and refuses address 72.
MAIN = r"""
#include <stdio.h>
static int asked;
EXPORT int cuTensorMapEncodeTiled(map_t* map, int type, uint32_t rank, void* address,
    const uint64_t* dims, const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
    int interleave, int swizzle, int promotion, int fill) {
  printf("%d %d %u", (int)((uintptr_t)address % 64), type, rank);
  for (uint32_t i = 0; i < rank; i++) printf(" %llu", (unsigned long long)dims[i]);
  for (uint32_t i = 0; i + 1 < rank; i++) printf(" %llu", (unsigned long long)strides[i]);
  for (uint32_t i = 0; i < rank; i++) printf(" %u", box[i]);
  for (uint32_t i = 0; i < rank; i++) printf(" %u", steps[i]);
  printf(" %d %d %d %d\n", interleave, swizzle, promotion, fill);
  memset(map, ++asked, sizeof *map);
  return address == (void*)72 ? 7 : 0;
}
int main(void) {
  static const char first[] = "@FIRST@", second[] = "@SECOND@";
  static map_t maps[4096];
  uintptr_t places[] = {4096, 4096, 8192, 4096, 8192, 64, 64};
  const char* texts[] = {first, first, first, second, first, second, second};
  for (int i = 0; i < 7; i++) {
    int code = moec_tensor_map(maps + i, (void*)places[i], texts[i]);
    printf("> %d %d\n", code, maps[i].opaque[127]);
  }
  /* Many more weights than places for them: each gets its own map all the same. */
  if (!freopen("/dev/null", "w", stdout)) return 1;
  for (uintptr_t round = 0; round < 2; round++)
    for (uintptr_t i = 1; i < 5000; i++) {
      map_t map;
      asked = (int)i - 1;
      if (moec_tensor_map(&map, (void*)(i << 20), first)) return 1;
      if (map.opaque[0] != (unsigned char)i) return 2;
    }
  return 0;
}
"""


def test_the_driver_is_asked_once_for_each_weight(tmp_path: Path) -> None:
    shape = Matmul(8, 2, 1024, 512, True, False, "bfloat16")
    boxes = row_box(shape, True, 8, 4), replace(row_box(shape, False, 8, 4), offset=8)
    first, second = (box.text("bfloat16") for box in boxes)
    source, program = tmp_path / "maps.c", tmp_path / "maps"
    main = MAIN.replace("@FIRST@", first).replace("@SECOND@", second)
    source.write_text(calls.SOURCE + maps.SOURCE + main)
    subprocess.run(["cc", "-O2", "-rdynamic", "-o", program, source, "-ldl"], check=True)
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert said.splitlines() == [
        first, "> 0 1", "> 0 1", first, "> 0 2", second, "> 0 3", "> 0 2",
        second, "> 7 4", second, "> 7 5",  # a refusal is not kept
    ]  # fmt: skip
