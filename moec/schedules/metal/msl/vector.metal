// Matrix times vector: decode, where every weight byte is used once and bandwidth is all.
//
// A threadgroup is 4 SIMD groups; each owns 4 rows of the weight and all of K, so that a load
// of the input serves 4 rows, a row is read by one SIMD group in 32 neighbouring vectors of 4,
// and the sum needs one simd_sum a row. The input is staged once for the 16 rows.

namespace moec {

constant int VECTOR_ROWS = 4;      // rows of one SIMD group
constant int VECTOR_CHUNK = 2048;  // floats of the input staged at a time

// Stage x[k0 .. k0 + count) as floats. With `weight` the values are multiplied and rounded to
// the format of x, as a model that weights its experts' input rounds them.
template <typename X, int VEC, bool WEIGHTED>
inline void stage_input(threadgroup float4* staged, const device typename X::store* x, float weight,
                        int count, int tid) {
  if (VEC == 4) {
    const device typename X::store4* wide = (const device typename X::store4*)x;
    for (int i = tid; i < count / 4; i += 128) {
      typename X::store4 raw = wide[i];
      float4 v = X::get4(raw);
      if (WEIGHTED) {
        v = v * weight;
        v = float4(X::round(v.x), X::round(v.y), X::round(v.z), X::round(v.w));
      }
      staged[i] = v;
    }
  } else {
    threadgroup float* flat = (threadgroup float*)staged;
    for (int i = tid; i < count; i += 128) {
      typename X::store raw = x[i];
      float v = X::get(raw);
      flat[i] = WEIGHTED ? X::round(v * weight) : v;
    }
  }
}

// acc[r] += the dot product of x with the weight row that starts at at[r] (-1: no row). All
// threads of the threadgroup must call this; acc is complete after a simd_sum.
template <typename W, typename X, int VEC, bool WEIGHTED>
inline void dot_rows(thread float* acc, const device typename W::store* w, thread const long* at,
                     const device typename X::store* x, float weight, int width,
                     threadgroup float4* staged, int tid) {
  int lane = tid % 32;
  for (int k0 = 0; k0 < width; k0 += VECTOR_CHUNK) {
    int count = min(VECTOR_CHUNK, width - k0);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the chunk before has been read
    stage_input<X, VEC, WEIGHTED>(staged, x + k0, weight, count, tid);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int r = 0; r < VECTOR_ROWS; ++r) {
      if (at[r] < 0) continue;
      const device typename W::store* row = w + (at[r] + k0);
      if (VEC == 4) {
        const device typename W::store4* wide = (const device typename W::store4*)row;
        for (int i = lane; i < count / 4; i += 32) {
          typename W::store4 raw = wide[i];
          float4 v = staged[i];
          acc[r] += dot(W::get4(raw), v);
        }
      } else {
        threadgroup float* flat = (threadgroup float*)staged;
        for (int i = lane; i < count; i += 32) {
          typename W::store raw = row[i];
          float v = flat[i];
          acc[r] += W::get(raw) * v;
        }
      }
    }
  }
}

// y[column] of a plain projection; grid (columns / 16, rows of x).
template <typename W, typename X, int VEC, bool BIAS>
inline void vector_linear(const device typename X::store* x, const device typename W::store* w,
                          const device float* bias, device float* y, int columns, int width,
                          threadgroup float4* staged, int bx, int by, int tid) {
  int first = bx * 16 + tid / 32 * VECTOR_ROWS;
  long at[4];
  float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int r = 0; r < VECTOR_ROWS; ++r) at[r] = first + r < columns ? long(first + r) * width : -1;
  dot_rows<W, X, VEC, false>(acc, w, at, x + long(by) * width, 1.0f, width, staged, tid);
  for (int r = 0; r < VECTOR_ROWS; ++r) {
    float total = simd_sum(acc[r]);
    if (tid % 32 == 0 && at[r] >= 0) {
      if (BIAS) total += bias[first + r];
      y[long(by) * columns + first + r] = total;
    }
  }
}

// One expert's activated row: h[row][column] = act(gate, up). A gated SIMD group has 2 columns,
// whose gate and up rows are its 4 rows; without gate it has 4 columns.
template <typename W, typename X, typename H, typename A, int VEC, bool GATED, bool BIAS, bool WEIGHTED>
inline void vector_activated(const device typename X::store* x, const device typename W::store* w,
                             const device float* bias, float weight, device typename H::store* h,
                             int columns, int width, threadgroup float4* staged, int bx, int tid) {
  const int own = GATED ? 2 : 4;
  int first = bx * own * 4 + tid / 32 * own;
  long at[4];
  float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int r = 0; r < VECTOR_ROWS; ++r) {
    int column = first + r % own;
    long row = r < own ? column : column + columns;
    at[r] = column < columns ? row * width : -1;
  }
  dot_rows<W, X, VEC, WEIGHTED>(acc, w, at, x, weight, width, staged, tid);
  for (int r = 0; r < VECTOR_ROWS; ++r) acc[r] = simd_sum(acc[r]);
  if (tid % 32 != 0) return;
  for (int c = 0; c < own; ++c) {
    int column = first + c;
    if (column >= columns) continue;
    float gate = acc[c], up = GATED ? acc[c + 2] : 0.0f;
    if (BIAS) {
      gate += bias[column];
      if (GATED) up += bias[column + columns];
    }
    h[column] = H::put(A::apply(gate, up));
  }
}

// h[t * K + k] of the pair (t, k) = by, whose expert ids name; `only` >= 0 does that expert
// alone. Pairs with an id outside [0, experts) are left as they are.
template <typename W, typename X, typename H, typename A, int VEC, bool GATED, bool BIAS, bool WEIGHTED>
inline void vector_pair(const device typename X::store* x, const device int* ids,
                        const device float* weights, const device typename W::store* w,
                        const device float* bias, device typename H::store* h, int experts,
                        int top_k, int columns, int width, int only, threadgroup float4* staged,
                        int bx, int by, int tid) {
  // One lane loads what all need: a load of 32 lanes would be 32 loads of one word.
  int e = -1;
  float weight = 1.0f;
  if (tid % 32 == 0) {
    e = ids[by];
    if (WEIGHTED) weight = weights[by];
  }
  e = simd_broadcast(e, ushort(0));
  if (e < 0 || e >= experts || (only >= 0 && e != only)) return;
  if (WEIGHTED) weight = simd_broadcast(weight, ushort(0));
  long rows = GATED ? 2 * columns : columns;
  const device float* own_bias = bias;
  if (BIAS) own_bias = bias + e * rows;
  vector_activated<W, X, H, A, VEC, GATED, BIAS, WEIGHTED>(
      x + long(by / top_k) * width, w + e * rows * width, own_bias, weight, h + long(by) * columns, columns,
      width, staged, bx, tid);
}

// y[t] = the sum over k, in this order, of weight * (down[e_k] h[t * K + k] + bias). With
// `only` >= 0 that expert's part is added to y, which the first one (only = 0) clears.
template <typename W, typename X, int VEC, bool BIAS, bool WEIGHTED>
inline void vector_down(const device typename X::store* h, const device int* ids,
                        const device float* weights, const device typename W::store* w,
                        const device float* bias, device float* y, int experts, int top_k,
                        int columns, int width, int only, threadgroup float4* staged, int bx,
                        int by, int tid) {
  int first = bx * 16 + tid / 32 * VECTOR_ROWS, lane = tid % 32;
  float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  long at[4];
  for (int r = 0; r < VECTOR_ROWS; ++r) at[r] = first + r < columns ? long(first + r) * width : -1;
  for (int k = 0; k < top_k; ++k) {
    int pair = by * top_k + k, e = -1;
    float weight = 1.0f;
    if (lane == 0) {
      e = ids[pair];
      if (WEIGHTED) weight = weights[pair];
    }
    e = simd_broadcast(e, ushort(0));
    if (e < 0 || e >= experts || (only >= 0 && e != only)) continue;
    if (WEIGHTED) weight = simd_broadcast(weight, ushort(0));
    float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    dot_rows<W, X, VEC, false>(acc, w + long(e) * columns * width, at, h + long(pair) * width, 1.0f, width,
                               staged, tid);
    for (int r = 0; r < VECTOR_ROWS; ++r) {
      float part = simd_sum(acc[r]);
      if (BIAS && lane == 0 && at[r] >= 0) part += bias[long(e) * columns + first + r];
      total[r] += weight * part;
    }
  }
  if (lane != 0) return;
  for (int r = 0; r < VECTOR_ROWS; ++r) {
    if (first + r >= columns) continue;
    device float* place = y + (long(by) * columns + first + r);
    if (only > 0) {
      float before = *place;
      *place = before + total[r];
    } else {
      *place = total[r];
    }
  }
}

}  // namespace moec
