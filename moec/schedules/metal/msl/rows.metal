// Kernels on whole rows: RMSNorm, the weighted sum over a token's experts, the block's output.

namespace moec {

// y = x * (mean(x^2) + eps)^-0.5 [* weight] [* scale]; grid (T), 128 threads. When a constant
// scale follows, both products are rounded to the format of y: each was an operation of its own.
template <typename X, typename Y, bool WEIGHTED, bool SCALED>
inline void rms_norm(const device typename X::store* x, const device float* weight, device typename Y::store* y,
                     int width, float eps, float scale, threadgroup float4* scratch, int token, int tid) {
  threadgroup float* sums = (threadgroup float*)scratch;
  const device typename X::store* row = x + long(token) * width;
  float squares = 0.0f;
  for (int i = tid; i < width; i += 128) {
    typename X::store raw = row[i];
    float v = X::get(raw);
    squares += v * v;
  }
  squares = simd_sum(squares);
  if (tid % 32 == 0) sums[tid / 32] = squares;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0.0f;
  for (int i = 0; i < 4; ++i) total += sums[i];
  float factor = 1.0f / sqrt(total / float(width) + eps);
  for (int i = tid; i < width; i += 128) {
    typename X::store raw = row[i];
    float v = X::get(raw) * factor;
    if (SCALED) v = Y::round(v);
    if (WEIGHTED) v = v * weight[i];
    if (SCALED) v = Y::round(v) * scale;
    y[long(token) * width + i] = Y::put(v);
  }
}

// y[t] = the sum over k, in this order, of weights[t, k] * rows[t * K + k]; grid (width / 128, T).
template <bool WEIGHTED>
inline void reduce_rows(const device float* rows, const device float* weights, device float* y, int width,
                        int top_k, int bx, int token, int tid) {
  int column = bx * 128 + tid;
  if (column >= width) return;
  float total = 0.0f;
  for (int k = 0; k < top_k; ++k) {
    long pair = long(token) * top_k + k;
    float v = rows[pair * width + column];
    if (WEIGHTED) v = v * weights[pair];
    total += v;
  }
  y[long(token) * width + column] = total;
}

// y = scale * routed [+ sigmoid(gate) * shared] [+ residual], rounded once; grid (width / 128, T).
template <typename Y, typename R, bool SHARED, bool GATED, bool RESIDUAL>
inline void combine(const device float* routed, const device float* shared, const device float* gate,
                    const device typename R::store* residual, device typename Y::store* y, int width, float scale,
                    int bx, int token, int tid) {
  int column = bx * 128 + tid;
  if (column >= width) return;
  long at = long(token) * width + column;
  float v = routed[at];
  v = v * scale;
  if (SHARED) {
    float s = shared[at];
    if (GATED) {
      float g = gate[token];
      s = s * sigmoid(g);
    }
    v += s;
  }
  if (RESIDUAL) {
    typename R::store raw = residual[at];
    v += R::get(raw);
  }
  y[at] = Y::put(v);
}

}  // namespace moec
