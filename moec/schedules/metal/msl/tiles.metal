// Matrix times matrix on simdgroup matrices: prefill, where rows of one expert share its weight.
//
// A threadgroup is 4 SIMD groups and makes 32 rows x 64 columns (gated: 32 gate and 32 up
// columns, so that the activation meets both in the epilogue). K goes in steps of 32 through
// threadgroup memory, in blocks of 8 x 8, so that a simdgroup_load reads 64 neighbours. Each
// SIMD group owns 16 columns and all rows: a tile with few rows skips whole fragments, and costs
// what ceil(rows / 8) fragments cost. Accumulators are float.

namespace moec {

constant int TILE_ROWS = 32;
constant int TILE_COLUMNS = 64;
constant int TILE_K = 32;
constant int TILE_SCRATCH4 = 768;  // float4s of the two tiles; the result tile reuses them

// What a threadgroup works on, behind the tiles in the scratch.
struct TileInfo {
  threadgroup int* source;   // [32] row of x behind each tile row, -1 = none
  threadgroup float* weight;  // [32] routing weight that multiplies it
  threadgroup int* pair;     // [32] the pair t * K + k behind it
  threadgroup int* found;    // expert, first sorted row, rows
};

inline TileInfo tile_info(threadgroup float4* scratch) {
  TileInfo info;
  info.source = (threadgroup int*)(scratch + TILE_SCRATCH4);
  info.weight = (threadgroup float*)(scratch + (TILE_SCRATCH4 + 8));
  info.pair = (threadgroup int*)(scratch + (TILE_SCRATCH4 + 16));
  info.found = (threadgroup int*)(scratch + (TILE_SCRATCH4 + 24));
  return info;
}

// Which expert's rows tile number `index` holds: found = {expert, first row, rows}. The rows
// behind the last offset (ids that no expert has) are those of "expert" E; rows = 0 past the
// last tile. The first SIMD group adds up the tiles of 32 experts at a time.
inline void find_tile(TileInfo info, const device int* offsets, int experts, int rows, int index, int tid) {
  if (tid < 32) {
    int before = 0, expert = -1, first = 0, count = 0;
    for (int base = 0; base <= experts; base += 32) {
      int e = base + tid, begin = 0, end = 0;
      if (e <= experts) {
        begin = offsets[e];
        end = rows;
        if (e < experts) end = offsets[e + 1];
      }
      int tiles = (end - begin + TILE_ROWS - 1) / TILE_ROWS;
      int last = before + simd_prefix_inclusive_sum(tiles);
      int nth = index - (last - tiles);
      if (tiles > 0 && nth >= 0 && nth < tiles) {
        expert = e;
        first = begin + nth * TILE_ROWS;
        count = min(TILE_ROWS, end - first);
      }
      before = simd_max(last);
    }
    expert = simd_max(expert);
    first = simd_max(first);
    count = simd_max(count);
    if (tid == 0) {
      info.found[0] = expert;
      info.found[1] = first;
      info.found[2] = count;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// result[32][64] in the scratch = the rows of x named by info.source times 64 rows of w: the
// columns first + 0..split-1, then the same ones `columns` further down (gate and up).
template <typename W, typename X, int VEC, bool GATED, bool WEIGHTED>
inline void tile_product(threadgroup float4* scratch, TileInfo info, const device typename X::store* x,
                         const device typename W::store* w, int first, int columns, int width,
                         int rows, int tid) {
  typedef typename tile<W, X>::type element;
  typedef typename tile<W, X>::type4 element4;
  const int split = GATED ? 32 : 64;
  const int steps = TILE_K / 8;
  threadgroup element* a = (threadgroup element*)scratch;
  threadgroup element* b = a + TILE_ROWS * TILE_K;
  threadgroup element4* a4 = (threadgroup element4*)a;
  threadgroup element4* b4 = (threadgroup element4*)b;
  int group = tid / 32, fragments = (rows + 7) / 8;
  simdgroup_float8x8 c[8];
  for (int i = 0; i < 8; ++i) c[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (int k0 = 0; k0 < width; k0 += TILE_K) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the step before has been read
    for (int i = tid; i < fragments * 8 * (TILE_K / 4); i += 128) {
      int r = i / (TILE_K / 4), k = i % (TILE_K / 4) * 4, s = info.source[r];
      float4 v = float4(0.0f);
      if (s >= 0) {
        const device typename X::store* from = x + (long(s) * width + k0 + k);
        if (VEC == 4) {
          if (k0 + k < width) {
            typename X::store4 raw = *(const device typename X::store4*)from;
            v = X::get4(raw);
          }
        } else {
          for (int j = 0; j < 4; ++j) {
            if (k0 + k + j >= width) continue;
            typename X::store raw = from[j];
            v[j] = X::get(raw);
          }
        }
        if (WEIGHTED) {
          float weight = info.weight[r];
          v = v * weight;
          v = float4(X::round(v.x), X::round(v.y), X::round(v.z), X::round(v.w));
        }
      }
      a4[((r / 8 * steps + k / 8) * 64 + r % 8 * 8 + k % 8) / 4] = element4(v);
    }
    for (int i = tid; i < TILE_COLUMNS * (TILE_K / 4); i += 128) {
      int n = i / (TILE_K / 4), k = i % (TILE_K / 4) * 4, column = first + n % split;
      float4 v = float4(0.0f);
      if (column < columns) {
        long row = n < split ? column : column + columns;
        const device typename W::store* from = w + (row * width + k0 + k);
        if (VEC == 4) {
          if (k0 + k < width) {
            typename W::store4 raw = *(const device typename W::store4*)from;
            v = W::get4(raw);
          }
        } else {
          for (int j = 0; j < 4; ++j) {
            if (k0 + k + j >= width) continue;
            typename W::store raw = from[j];
            v[j] = W::get(raw);
          }
        }
      }
      b4[((n / 8 * steps + k / 8) * 64 + n % 8 * 8 + k % 8) / 4] = element4(v);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < steps; ++k) {
      simdgroup_matrix<element, 8, 8> right[2];
      // The weight tile is [column][k], and the product wants [k][column].
      for (int j = 0; j < 2; ++j)
        simdgroup_load(right[j], b + ((group * 2 + j) * steps + k) * 64, 8, ulong2(0), true);
      for (int i = 0; i < 4; ++i) {
        if (i >= fragments) continue;
        simdgroup_matrix<element, 8, 8> left;
        simdgroup_load(left, a + (i * steps + k) * 64, 8, ulong2(0), false);
        for (int j = 0; j < 2; ++j) simdgroup_multiply_accumulate(c[i * 2 + j], left, right[j], c[i * 2 + j]);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the result takes the place of the tiles
  threadgroup float* result = (threadgroup float*)scratch;
  for (int i = 0; i < 4; ++i) {
    if (i >= fragments) continue;
    for (int j = 0; j < 2; ++j)
      simdgroup_store(c[i * 2 + j], result + (i * 8 * TILE_COLUMNS + (group * 2 + j) * 8), ulong(TILE_COLUMNS),
                      ulong2(0), false);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// h[r][column] = act(gate + bias, up + bias) of the result tile.
template <typename H, typename A, bool GATED, bool BIAS>
inline void tile_activated(threadgroup float4* scratch, const device float* bias, device typename H::store* h,
                           int first, int columns, int rows, int tid) {
  const int split = GATED ? 32 : 64;
  threadgroup float* result = (threadgroup float*)scratch;
  for (int i = tid; i < rows * split; i += 128) {
    int r = i / split, c = i % split, column = first + c;
    if (column >= columns) continue;
    float gate = result[r * TILE_COLUMNS + c], up = 0.0f;
    if (GATED) up = result[r * TILE_COLUMNS + c + split];
    if (BIAS) {
      gate += bias[column];
      if (GATED) up += bias[column + columns];
    }
    h[long(r) * columns + column] = H::put(A::apply(gate, up));
  }
}

// The first grouped matmul: rows of x gathered through row_order, the activation fused in.
// Sorted rows of h; grid (columns / split, tiles).
template <typename W, typename X, typename H, typename A, int VEC, bool GATED, bool BIAS, bool WEIGHTED>
inline void grouped_gate_up(const device typename X::store* x, const device int* row_order,
                            const device int* offsets, const device float* weights,
                            const device typename W::store* w, const device float* bias,
                            device typename H::store* h, int experts, int top_k, int columns, int width,
                            int total, threadgroup float4* scratch, int bx, int by, int tid) {
  TileInfo info = tile_info(scratch);
  find_tile(info, offsets, experts, total, by, tid);
  int e = info.found[0], start = info.found[1], rows = info.found[2];
  if (e < 0 || e >= experts) return;
  if (tid < TILE_ROWS) {
    int source = -1;
    float weight = 1.0f;
    if (tid < rows) {
      int pair = row_order[start + tid];
      source = pair / top_k;
      if (WEIGHTED) weight = weights[pair];
    }
    info.source[tid] = source;
    info.weight[tid] = weight;
  }
  int first = bx * (GATED ? 32 : 64);
  long stride = GATED ? 2 * columns : columns;
  const device float* own_bias = bias;
  if (BIAS) own_bias = bias + e * stride;
  tile_product<W, X, VEC, GATED, WEIGHTED>(scratch, info, x, w + e * stride * width, first, columns, width, rows,
                                           tid);
  tile_activated<H, A, GATED, BIAS>(scratch, own_bias, h + long(start) * columns, first, columns, rows, tid);
}

// The second grouped matmul: sorted rows of h in, rows[t * K + k] out; pairs that no expert
// has become zeros, so that the reduction needs no ids. Grid (columns / 64, tiles).
template <typename W, typename X, int VEC, bool BIAS>
inline void grouped_down(const device typename X::store* h, const device int* row_order,
                         const device int* offsets, const device typename W::store* w,
                         const device float* bias, device float* out, int experts, int columns, int width,
                         int total, threadgroup float4* scratch, int bx, int by, int tid) {
  TileInfo info = tile_info(scratch);
  find_tile(info, offsets, experts, total, by, tid);
  int e = info.found[0], start = info.found[1], rows = info.found[2];
  if (e < 0) return;
  int first = bx * TILE_COLUMNS;
  bool real = e < experts;
  if (tid < TILE_ROWS) {
    info.source[tid] = tid < rows ? start + tid : -1;
    if (tid < rows) info.pair[tid] = row_order[start + tid];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (real) {
    tile_product<W, X, VEC, false, false>(scratch, info, h, w + long(e) * columns * width, first, columns, width,
                                          rows, tid);
  }
  threadgroup float* result = (threadgroup float*)scratch;
  for (int i = tid; i < rows * TILE_COLUMNS; i += 128) {
    int r = i / TILE_COLUMNS, column = first + i % TILE_COLUMNS;
    if (column >= columns) continue;
    float v = 0.0f;
    if (real) {
      v = result[i];
      if (BIAS) v += bias[long(e) * columns + column];
    }
    int pair = info.pair[r];
    out[long(pair) * columns + column] = v;
  }
}

// The rows of a dense matmul: tile by holds rows 32 by .. 32 by + 31 of x.
inline int dense_rows(TileInfo info, int tokens, int by, int tid) {
  int rows = min(TILE_ROWS, tokens - by * TILE_ROWS);
  if (tid < TILE_ROWS) info.source[tid] = tid < rows ? by * TILE_ROWS + tid : -1;
  return rows;
}

// y = x w^T (+ bias), float; grid (columns / 64, rows / 32).
template <typename W, typename X, int VEC, bool BIAS>
inline void dense_linear(const device typename X::store* x, const device typename W::store* w,
                         const device float* bias, device float* y, int columns, int width, int tokens,
                         threadgroup float4* scratch, int bx, int by, int tid) {
  TileInfo info = tile_info(scratch);
  int rows = dense_rows(info, tokens, by, tid), first = bx * TILE_COLUMNS;
  if (rows <= 0) return;
  tile_product<W, X, VEC, false, false>(scratch, info, x, w, first, columns, width, rows, tid);
  threadgroup float* result = (threadgroup float*)scratch;
  for (int i = tid; i < rows * TILE_COLUMNS; i += 128) {
    int r = i / TILE_COLUMNS, column = first + i % TILE_COLUMNS;
    if (column >= columns) continue;
    float v = result[i];
    if (BIAS) v += bias[column];
    y[long(by * TILE_ROWS + r) * columns + column] = v;
  }
}

// h = act of a dense gate_up; grid (columns / split, rows / 32).
template <typename W, typename X, typename H, typename A, int VEC, bool GATED>
inline void dense_gate_up(const device typename X::store* x, const device typename W::store* w,
                          device typename H::store* h, int columns, int width, int tokens,
                          threadgroup float4* scratch, int bx, int by, int tid) {
  TileInfo info = tile_info(scratch);
  int rows = dense_rows(info, tokens, by, tid), first = bx * (GATED ? 32 : 64);
  if (rows <= 0) return;
  tile_product<W, X, VEC, GATED, false>(scratch, info, x, w, first, columns, width, rows, tid);
  // No bias: any pointer of the right type stands for it.
  const device float* none = (const device float*)x;
  tile_activated<H, A, GATED, false>(scratch, none, h + long(by) * TILE_ROWS * columns, first, columns, rows, tid);
}

}  // namespace moec
