// Matrix times matrix on simdgroup matrices: prefill, where rows of one expert share its weight.
//
// A threadgroup makes ROWS x COLUMNS (gated: half of the columns are gate, half are up, so that
// the activation meets both in the epilogue). K goes in steps of STEP through threadgroup
// memory, in blocks of 8 x 8, so that a simdgroup_load reads 64 neighbours. Each SIMD group owns
// 16 columns and all rows: a tile with few rows skips whole fragments, and costs what
// ceil(rows / 8) fragments cost. Accumulators are float. Every element is the sum over K in
// steps of 8, in order, whatever the tile: all tiles give the same bits.

// An index into an array of fragments must be a constant, or the array is not in registers.
#define MOEC_UNROLL _Pragma("clang loop unroll(full)")

namespace moec {

template <int R, int C, int S> struct Tile {
  enum {
    ROWS = R,
    COLUMNS = C,
    STEP = S,
    THREADS = C / 16 * 32,
    FRAGMENTS = R / 8 * 2,        // accumulators of a SIMD group
    OPERANDS4 = (R + C) * S / 4,  // float4s of both operands; the result reuses them
    PART = 2048 / C,              // rows of the result that are in threadgroup memory at a time
    PARTS = R / PART
  };
};

// What a threadgroup works on, behind the operands in the scratch.
struct TileInfo {
  threadgroup int* source;    // [ROWS] row of x behind each tile row, -1 = none
  threadgroup float* weight;  // [ROWS] routing weight that multiplies it
  threadgroup int* pair;      // [ROWS] the pair t * K + k behind it
  threadgroup int* found;     // expert, first sorted row, rows
};

template <typename C> inline TileInfo tile_info(threadgroup float4* scratch) {
  TileInfo info;
  info.source = (threadgroup int*)(scratch + C::OPERANDS4);
  info.weight = (threadgroup float*)(scratch + (C::OPERANDS4 + C::ROWS / 4));
  info.pair = (threadgroup int*)(scratch + (C::OPERANDS4 + C::ROWS / 2));
  info.found = (threadgroup int*)(scratch + (C::OPERANDS4 + C::ROWS / 4 * 3));
  return info;
}

// Which expert's rows tile number `index` holds: found = {expert, first row, rows}. The rows
// behind the last offset (ids that no expert has) are those of "expert" E; rows = 0 past the
// last tile. The first SIMD group adds up the tiles of 32 experts at a time.
template <int ROWS>
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
      int tiles = (end - begin + ROWS - 1) / ROWS;
      int last = before + simd_prefix_inclusive_sum(tiles);
      int nth = index - (last - tiles);
      if (tiles > 0 && nth >= 0 && nth < tiles) {
        expert = e;
        first = begin + nth * ROWS;
        count = min(ROWS, end - first);
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

// 4 elements at `from`, of which `left` are inside of their row: the others are zero.
template <typename F, int VEC> inline float4 load4(const device typename F::store* from, int left) {
  float4 v = float4(0.0f);
  if (VEC == 4) {
    if (left > 0) {
      typename F::store4 raw = *(const device typename F::store4*)from;
      v = F::get4(raw);
    }
  } else {
    for (int j = 0; j < 4; ++j) {
      if (j >= left) continue;
      typename F::store raw = from[j];
      v[j] = F::get(raw);
    }
  }
  return v;
}

// c += the rows of x named by info.source times the tile's rows of w: the columns
// first + 0..split-1, then for a gated one those `columns` further down. `c` is what this SIMD
// group owns: two fragments side by side for 8 rows, then those of the next 8 rows.
template <typename C, typename W, typename X, int VEC, bool GATED, bool WEIGHTED>
inline void tile_product(thread simdgroup_float8x8* c, threadgroup float4* scratch, TileInfo info,
                         const device typename X::store* x, const device typename W::store* w, int first,
                         int columns, int width, int rows, int tid) {
  typedef typename staged<W, X>::type element;
  typedef typename staged<W, X>::type4 element4;
  const int split = GATED ? C::COLUMNS / 2 : C::COLUMNS;
  const int steps = C::STEP / 8, quads = C::STEP / 4;
  threadgroup element* a = (threadgroup element*)scratch;
  threadgroup element* b = a + C::ROWS * C::STEP;
  threadgroup element4* a4 = (threadgroup element4*)a;
  threadgroup element4* b4 = (threadgroup element4*)b;
  int group = tid / 32, fragments = (rows + 7) / 8;
  MOEC_UNROLL
  for (int i = 0; i < C::FRAGMENTS; ++i) c[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (int k0 = 0; k0 < width; k0 += C::STEP) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the step before has been read
    for (int i = tid; i < fragments * 8 * quads; i += C::THREADS) {
      int r = i / quads, k = i % quads * 4, s = info.source[r];
      float4 v = float4(0.0f);
      if (s >= 0) {
        v = load4<X, VEC>(x + (long(s) * width + k0 + k), width - k0 - k);
        if (WEIGHTED) {
          float weight = info.weight[r];
          v = v * weight;
          v = float4(X::round(v.x), X::round(v.y), X::round(v.z), X::round(v.w));
        }
      }
      a4[((r / 8 * steps + k / 8) * 64 + r % 8 * 8 + k % 8) / 4] = staged<W, X>::pack(v);
    }
    for (int i = tid; i < C::COLUMNS * quads; i += C::THREADS) {
      int n = i / quads, k = i % quads * 4, column = first + n % split;
      float4 v = float4(0.0f);
      if (column < columns) {
        long row = n < split ? column : column + columns;
        v = load4<W, VEC>(w + (row * width + k0 + k), width - k0 - k);
      }
      b4[((n / 8 * steps + k / 8) * 64 + n % 8 * 8 + k % 8) / 4] = staged<W, X>::pack(v);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < steps; ++k) {
      simdgroup_matrix<element, 8, 8> right[2];
      // The weight tile is [column][k], and the product wants [k][column].
      MOEC_UNROLL
      for (int j = 0; j < 2; ++j)
        simdgroup_load(right[j], b + ((group * 2 + j) * steps + k) * 64, 8, ulong2(0), true);
      MOEC_UNROLL
      for (int i = 0; i < C::ROWS / 8; ++i) {
        if (i >= fragments) continue;
        simdgroup_matrix<element, 8, 8> left;
        simdgroup_load(left, a + (i * steps + k) * 64, 8, ulong2(0), false);
        MOEC_UNROLL
        for (int j = 0; j < 2; ++j) simdgroup_multiply_accumulate(c[i * 2 + j], left, right[j], c[i * 2 + j]);
      }
    }
  }
}

// Part number `part` of the result as [PART][COLUMNS] in the scratch. All threads call this.
template <typename C>
inline threadgroup float* tile_part(thread const simdgroup_float8x8* c, threadgroup float4* scratch, int part,
                                    int rows, int tid) {
  threadgroup float* result = (threadgroup float*)scratch;
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the operands, or the part before, have been read
  MOEC_UNROLL
  for (int i = 0; i < C::PART / 8; ++i) {
    int fragment = part * (C::PART / 8) + i;
    if (fragment * 8 >= rows) continue;
    MOEC_UNROLL
    for (int j = 0; j < 2; ++j)
      simdgroup_store(c[fragment * 2 + j], result + (i * 8 * C::COLUMNS + (tid / 32 * 2 + j) * 8), C::COLUMNS,
                      ulong2(0), false);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return result;
}

// h[r][column] = act(gate + bias, up + bias) of the result, part by part.
template <typename C, typename H, typename A, bool GATED, bool BIAS>
inline void tile_activated(thread const simdgroup_float8x8* c, threadgroup float4* scratch,
                           const device float* bias, device typename H::store* h, int first, int columns,
                           int rows, int tid) {
  const int split = GATED ? C::COLUMNS / 2 : C::COLUMNS;
  MOEC_UNROLL
  for (int part = 0; part < C::PARTS; ++part) {
    int before = part * C::PART;
    if (before >= rows) continue;
    threadgroup float* result = tile_part<C>(c, scratch, part, rows, tid);
    for (int i = tid; i < min(int(C::PART), rows - before) * split; i += C::THREADS) {
      int r = i / split, n = i % split, column = first + n;
      if (column >= columns) continue;
      float gate = result[r * C::COLUMNS + n], up = 0.0f;
      if (GATED) up = result[r * C::COLUMNS + n + split];
      if (BIAS) {
        gate += bias[column];
        if (GATED) up += bias[column + columns];
      }
      h[long(before + r) * columns + column] = H::put(A::apply(gate, up));
    }
  }
}

// The first grouped matmul: rows of x gathered through row_order, the activation fused in.
// Sorted rows of h; grid (columns / split, tiles).
template <typename C, typename W, typename X, typename H, typename A, int VEC, bool GATED, bool BIAS, bool WEIGHTED>
inline void grouped_gate_up(const device typename X::store* x, const device int* row_order,
                            const device int* offsets, const device float* weights,
                            const device typename W::store* w, const device float* bias,
                            device typename H::store* h, int experts, int top_k, int columns, int width,
                            int total, threadgroup float4* scratch, int bx, int by, int tid) {
  TileInfo info = tile_info<C>(scratch);
  find_tile<C::ROWS>(info, offsets, experts, total, by, tid);
  int e = info.found[0], start = info.found[1], rows = info.found[2];
  if (e < 0 || e >= experts) return;
  if (tid < C::ROWS) {
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
  int first = bx * (GATED ? C::COLUMNS / 2 : C::COLUMNS);
  long stride = GATED ? 2 * columns : columns;
  const device float* own_bias = bias;
  if (BIAS) own_bias = bias + e * stride;
  simdgroup_float8x8 c[C::FRAGMENTS];
  tile_product<C, W, X, VEC, GATED, WEIGHTED>(c, scratch, info, x, w + e * stride * width, first, columns, width,
                                              rows, tid);
  tile_activated<C, H, A, GATED, BIAS>(c, scratch, own_bias, h + long(start) * columns, first, columns, rows, tid);
}

// The second grouped matmul: sorted rows of h in, rows[t * K + k] out; pairs that no expert
// has become zeros, so that the reduction needs no ids. Grid (columns / COLUMNS, tiles).
template <typename C, typename W, typename X, int VEC, bool BIAS>
inline void grouped_down(const device typename X::store* h, const device int* row_order,
                         const device int* offsets, const device typename W::store* w,
                         const device float* bias, device float* out, int experts, int columns, int width,
                         int total, threadgroup float4* scratch, int bx, int by, int tid) {
  TileInfo info = tile_info<C>(scratch);
  find_tile<C::ROWS>(info, offsets, experts, total, by, tid);
  int e = info.found[0], start = info.found[1], rows = info.found[2];
  if (e < 0) return;
  int first = bx * C::COLUMNS;
  if (e == experts) {
    for (int i = tid; i < rows * C::COLUMNS; i += C::THREADS) {
      int pair = row_order[start + i / C::COLUMNS], column = first + i % C::COLUMNS;
      if (column < columns) out[long(pair) * columns + column] = 0.0f;
    }
    return;
  }
  if (tid < C::ROWS) {
    info.source[tid] = tid < rows ? start + tid : -1;
    if (tid < rows) info.pair[tid] = row_order[start + tid];
  }
  simdgroup_float8x8 c[C::FRAGMENTS];
  tile_product<C, W, X, VEC, false, false>(c, scratch, info, h, w + long(e) * columns * width, first, columns,
                                           width, rows, tid);
  MOEC_UNROLL
  for (int part = 0; part < C::PARTS; ++part) {
    int before = part * C::PART;
    if (before >= rows) continue;
    threadgroup float* result = tile_part<C>(c, scratch, part, rows, tid);
    for (int i = tid; i < min(int(C::PART), rows - before) * C::COLUMNS; i += C::THREADS) {
      int column = first + i % C::COLUMNS, pair = info.pair[before + i / C::COLUMNS];
      if (column >= columns) continue;
      float v = result[i];
      if (BIAS) v += bias[long(e) * columns + column];
      out[long(pair) * columns + column] = v;
    }
  }
}

// The rows of a dense matmul: tile by holds rows ROWS by .. of x.
template <int ROWS> inline int dense_rows(TileInfo info, int tokens, int by, int tid) {
  int rows = min(ROWS, tokens - by * ROWS);
  if (tid < ROWS) info.source[tid] = tid < rows ? by * ROWS + tid : -1;
  return rows;
}

// y = x w^T (+ bias), float; grid (columns / COLUMNS, rows / ROWS).
template <typename C, typename W, typename X, int VEC, bool BIAS>
inline void dense_linear(const device typename X::store* x, const device typename W::store* w,
                         const device float* bias, device float* y, int columns, int width, int tokens,
                         threadgroup float4* scratch, int bx, int by, int tid) {
  TileInfo info = tile_info<C>(scratch);
  int rows = dense_rows<C::ROWS>(info, tokens, by, tid), first = bx * C::COLUMNS;
  if (rows <= 0) return;
  simdgroup_float8x8 c[C::FRAGMENTS];
  tile_product<C, W, X, VEC, false, false>(c, scratch, info, x, w, first, columns, width, rows, tid);
  MOEC_UNROLL
  for (int part = 0; part < C::PARTS; ++part) {
    int before = part * C::PART;
    if (before >= rows) continue;
    threadgroup float* result = tile_part<C>(c, scratch, part, rows, tid);
    for (int i = tid; i < min(int(C::PART), rows - before) * C::COLUMNS; i += C::THREADS) {
      int r = before + i / C::COLUMNS, column = first + i % C::COLUMNS;
      if (column >= columns) continue;
      float v = result[i];
      if (BIAS) v += bias[column];
      y[long(by * C::ROWS + r) * columns + column] = v;
    }
  }
}

// h = act of a dense gate_up; grid (columns / split, rows / ROWS).
template <typename C, typename W, typename X, typename H, typename A, int VEC, bool GATED>
inline void dense_gate_up(const device typename X::store* x, const device typename W::store* w,
                          device typename H::store* h, int columns, int width, int tokens,
                          threadgroup float4* scratch, int bx, int by, int tid) {
  TileInfo info = tile_info<C>(scratch);
  int rows = dense_rows<C::ROWS>(info, tokens, by, tid);
  int first = bx * (GATED ? C::COLUMNS / 2 : C::COLUMNS);
  if (rows <= 0) return;
  simdgroup_float8x8 c[C::FRAGMENTS];
  tile_product<C, W, X, VEC, GATED, false>(c, scratch, info, x, w, first, columns, width, rows, tid);
  // No bias: any pointer of the right type stands for it.
  const device float* none = (const device float*)x;
  tile_activated<C, H, A, GATED, false>(c, scratch, none, h + long(by) * C::ROWS * columns, first, columns, rows,
                                        tid);
}

}  // namespace moec
