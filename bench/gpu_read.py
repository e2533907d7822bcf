"""How fast a Hopper GPU reads weights, by the shape of the boxes that the TMA unit copies.

    python bench/gpu_read.py make FILE    # compile the kernel, on a machine with moec[cuda]
    python bench/gpu_read.py run FILE     # time it, on the GPU machine: torch and a driver

A block a multiprocessor copies boxes of a [rows, K] bfloat16 matrix (3.8 GB, random) into a ring
of shared memory and does nothing with them. Printed: TB/s, median and range of three rounds.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
from pathlib import Path
from typing import Any

SOURCE = r"""
__device__ __forceinline__ unsigned at(const void* p) {
  return (unsigned)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void wait(const void* barrier, int parity) {
  unsigned done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(at(barrier)), "r"(parity) : "memory");
  } while (!done);
}
// depth 0: `bytes` in a row; else boxes of `rows` rows by `depth` blocks of 64 columns.
extern "C" __global__ void __launch_bounds__(64) moec_read(
    const __grid_constant__ CUtensorMap map, const char* weights, int depth, int rows, int bytes,
    int tiles, int steps, int stages) {
  extern __shared__ __align__(1024) char ring[];
  __shared__ unsigned long long full[32], empty[32];
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(at(&full[i])));
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(at(&empty[i])));
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  int stage = 0, phase = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for (int step = 0; step < steps; ++step) {
      if (threadIdx.x == 0) {
        wait(&empty[stage], phase ^ 1);
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
                     ::"r"(at(&full[stage])), "r"(bytes) : "memory");
        char* to = ring + (long)stage * bytes;
        if (depth)
          asm volatile(
              "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
              " [%0], [%1, {%2, %3, %4}], [%5];"
              ::"r"(at(to)), "l"(&map), "r"(0), "r"(tile * rows), "r"(step * depth),
              "r"(at(&full[stage])) : "memory");
        else
          asm volatile(
              "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
              " [%0], [%1], %2, [%3];"
              ::"r"(at(to)), "l"(weights + (long)tile * bytes), "r"(bytes),
              "r"(at(&full[stage])) : "memory");
      } else if (threadIdx.x == 32) {
        wait(&full[stage], phase);
        asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(at(&empty[stage])) : "memory");
      }
      if (++stage == stages) stage = 0, phase ^= 1;
    }
  }
}
"""
ROWS, K, SMS = 64 * 4096, 7168, 132
BYTES = ROWS * K * 2
# rows of a box and K blocks of 128 bytes, stages; rows 0: so many bytes that follow one another
BOXES = (
    (128, 1, 8), (128, 2, 5), (128, 4, 3), (256, 1, 6), (64, 4, 5), (16, 8, 10), (16, 16, 5),
    (0, 16384, 8), (0, 32768, 4),
)  # fmt: skip
PROMOTIONS = (0, 3)  # what a miss brings into the L2: as it is asked for, or 256 bytes


def make(path: Path) -> None:
    """Compile the kernel for sm_90a."""
    import tvm_ffi

    from moec.schedules.cuda import toolchain

    with toolchain.compiling("sm_90a"):
        path.write_bytes(tvm_ffi.get_global_func("tvm_callback_cuda_compile")(SOURCE))


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA driver error {code}")


def _map(cuda: Any, address: int, rows: int, depth: int, promotion: int) -> Any:
    """The 128 bytes of a tensor map over the matrix, at an address that is a multiple of 64."""
    room = ctypes.create_string_buffer(192)
    place = -(-ctypes.addressof(room) // 64) * 64
    dims, strides = (ctypes.c_uint64 * 3)(64, ROWS, K // 64), (ctypes.c_uint64 * 2)(K * 2, 128)
    box, ones = (ctypes.c_uint32 * 3)(64, rows, depth), (ctypes.c_uint32 * 3)(1, 1, 1)
    bfloat16, swizzle = 9, 3
    _check(
        cuda.cuTensorMapEncodeTiled(
            ctypes.c_void_p(place), bfloat16, 3, ctypes.c_void_p(address), dims, strides, box,
            ones, 0, swizzle, promotion, 0,
        )
    )  # fmt: skip
    return room, place


def run(path: Path) -> None:
    """Time every box; prints a table."""
    import torch

    cuda = ctypes.CDLL("libcuda.so.1")
    weights = torch.empty(ROWS, K, device="cuda", dtype=torch.bfloat16)
    for row in range(0, ROWS, 4096):
        weights[row : row + 4096].normal_()
    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    _check(cuda.cuModuleLoadData(ctypes.byref(module), path.read_bytes()))
    _check(cuda.cuModuleGetFunction(ctypes.byref(kernel), module, b"moec_read"))
    _check(cuda.cuFuncSetAttribute(kernel, 8, 220 * 1024))  # dynamic shared memory at most

    def launcher(rows: int, depth: int, stages: int, promotion: int) -> Any:
        size = rows * depth * 128 or depth
        tiles, steps = (ROWS // rows, K // 64 // depth) if rows else (BYTES // depth, 1)
        room, place = _map(cuda, weights.data_ptr(), rows or 8, depth if rows else 1, promotion)
        numbers = (depth if rows else 0, rows, size, tiles, steps, stages)
        values = [ctypes.c_void_p(weights.data_ptr()), *map(ctypes.c_int, numbers)]
        args = (ctypes.c_void_p * 8)(place, *map(ctypes.addressof, values))

        def launch(keep: Any = (room, values)) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            _check(
                cuda.cuLaunchKernel(kernel, SMS, 1, 1, 64, 1, 1, size * stages, stream, args, None)
            )

        return launch

    launches = {
        (box, promotion): launcher(*box, promotion)
        for box in BOXES for promotion in (PROMOTIONS if box[0] else (0,))
    }  # fmt: skip
    speeds: dict[Any, list[float]] = {key: [] for key in launches}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        for key, launch in launches.items():
            launch()
            begin.record()
            for _ in range(6):
                launch()
            end.record()
            torch.cuda.synchronize()
            speeds[key].append(6 * BYTES / begin.elapsed_time(end) / 1e9)
    print(torch.cuda.get_device_name())
    for ((rows, depth, stages), promotion), own in speeds.items():
        what = f"{rows:3} rows of {depth * 128:4} bytes" if rows else f"{depth} bytes in a row"
        print(
            f"{what:24} {stages:2} stages, promotion {promotion}: "
            f"{statistics.median(own):.3f} TB/s ({min(own):.3f} to {max(own):.3f})"
        )


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("make", "run"):
        sys.exit(__doc__)
    (make if sys.argv[1] == "make" else run)(Path(sys.argv[2]))
