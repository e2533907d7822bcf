// SIMD-group functions and simdgroup matrices.
#pragma once
#include <utility>

#include "msl_pointer.h"
#include "msl_types.h"

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }
#define threadgroup_barrier(flags) \
  (::msl::threadgroup_barrier(__LINE__, ((int)(flags) & (int)metal::mem_flags::mem_threadgroup) != 0))
#define simdgroup_barrier(flags) \
  (::msl::simdgroup_barrier(((int)(flags) & (int)metal::mem_flags::mem_threadgroup) != 0))

namespace detail {
template <class T> struct Exchange { T in, out; unsigned lane; };
template <class T, class F> T collective(const char* name, T value, unsigned lane, F f) {
  Exchange<T> mine{value, value, lane};
  msl::rendezvous(name, &mine, [&](void** all, int n) { f((Exchange<T>**)all, n); });
  return mine.out;
}
// A value from a lane outside the SIMD group is undefined: an error here, not a wrapped index.
template <class T> T pick(const char* name, T value, int lane) {
  return collective(name, value, (unsigned)lane, [name](Exchange<T>** all, int n) {
    for (int i = 0; i < n; ++i) {
      if (all[i]->lane >= (unsigned)n)
        msl::fail(std::string(name) + ": lane " + std::to_string((int)all[i]->lane) + " is outside the SIMD group");
      all[i]->out = all[all[i]->lane]->in;
    }
  });
}
}  // namespace detail

template <class T, class L> T simd_shuffle(T v, L lane) { return detail::pick("simd_shuffle", v, (int)lane); }
template <class T, class L> T simd_broadcast(T v, L lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, (const void*)&v, sizeof v);
  bits = msl::broadcast(bits, (int)lane);
  std::memcpy((void*)&v, &bits, sizeof v);
  return v;
}
template <class T, class L> T simd_shuffle_xor(T v, L mask) {
  return detail::pick("simd_shuffle_xor", v, msl::lane_id() ^ (int)mask);
}
// Lanes whose source lies outside get poison: their value is undefined.
template <class T, class D> T simd_shuffle_down(T v, D delta) {
  return detail::collective("simd_shuffle_down", v, (unsigned)delta, [](detail::Exchange<T>** all, int n) {
    for (int i = 0; i < n; ++i) {
      unsigned s = i + all[i]->lane;
      if (s < (unsigned)n) all[i]->out = all[s]->in;
      else std::memset((void*)&all[i]->out, 0xFF, sizeof(T));
    }
  });
}
template <class T, class D> T simd_shuffle_up(T v, D delta) {
  return detail::collective("simd_shuffle_up", v, (unsigned)delta, [](detail::Exchange<T>** all, int n) {
    for (int i = 0; i < n; ++i) {
      int s = i - (int)all[i]->lane;
      if (s >= 0) all[i]->out = all[s]->in;
      else std::memset((void*)&all[i]->out, 0xFF, sizeof(T));
    }
  });
}
#define MSL_REDUCE(name, expr)                                                             \
  template <class T> T name(T v) {                                                         \
    return detail::collective(#name, v, 0u, [](detail::Exchange<T>** all, int n) {         \
      T r = all[0]->in;                                                                    \
      for (int i = 1; i < n; ++i) { T x = all[i]->in; r = expr; }                          \
      for (int i = 0; i < n; ++i) all[i]->out = r;                                         \
    });                                                                                    \
  }
MSL_REDUCE(simd_sum, r + x)
MSL_REDUCE(simd_max, (r < x ? x : r))
MSL_REDUCE(simd_min, (x < r ? x : r))
#undef MSL_REDUCE
template <class T> T simd_prefix_inclusive_sum(T v) {
  return detail::collective("simd_prefix_inclusive_sum", v, 0u, [](detail::Exchange<T>** all, int n) {
    T sum = T(0);
    for (int i = 0; i < n; ++i) all[i]->out = sum = sum + all[i]->in;
  });
}
template <class T> T simd_prefix_exclusive_sum(T v) {
  return detail::collective("simd_prefix_exclusive_sum", v, 0u, [](detail::Exchange<T>** all, int n) {
    T sum = T(0);
    for (int i = 0; i < n; ++i) { all[i]->out = sum; sum = sum + all[i]->in; }
  });
}

// ---------------------------------------------------------------- simdgroup_matrix
// Which lane holds which element is not part of the language: kernels must not look. Here the
// first lane holds all of them, and the others only say that they take part.
template <class T, int C, int R> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "only 8x8 exists");
  float e[64];  // every T is one
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;

template <class T, int C, int R, class V> simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(V v) {
  simdgroup_matrix<T, C, R> m;
  if (!msl::matrix_begin("make_filled_simdgroup_matrix")) return m;
  for (int i = 0; i < 64; ++i) m.e[i] = (float)T((float)v);
  msl::matrix_end();
  return m;
}
template <class T, msl::Space S, class P>
void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, msl::ptr<S, P> p, ulong stride = 8, ulong2 origin = ulong2(0ul), bool transpose = false) {
  static_assert(std::is_same<T, std::remove_const_t<P>>::value, "simdgroup_load: element types differ");
  if (!msl::matrix_begin("simdgroup_load", p.at, stride)) return;
  for (int r = 0; r < 8; ++r) {
    const T* row = p.at + (origin.y + r) * stride + origin.x;
    msl::access(S, row, 8 * sizeof(T), sizeof(T), false, p.begin, p.end, p.buffer);
    for (int c = 0; c < 8; ++c) m.e[transpose ? c * 8 + r : r * 8 + c] = (float)row[c];
  }
  msl::matrix_end();
}
template <class T, msl::Space S>
void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, msl::ptr<S, T> p, ulong stride = 8, ulong2 origin = ulong2(0ul), bool transpose = false) {
  if (!msl::matrix_begin("simdgroup_store", p.at, stride)) return;
  for (int r = 0; r < 8; ++r) {
    T* row = p.at + (origin.y + r) * stride + origin.x;
    msl::access(S, row, 8 * sizeof(T), sizeof(T), true, p.begin, p.end, p.buffer);
    for (int c = 0; c < 8; ++c) row[c] = T(m.e[transpose ? c * 8 + r : r * 8 + c]);
  }
  msl::matrix_end();
}
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c) {
  if (!msl::matrix_begin("simdgroup_multiply_accumulate")) return;
  msl::matrix_product(d.e, a.e, b.e, c.e);
  if (!std::is_same<D, float>::value)
    for (float& v : d.e) v = (float)D(v);
  msl::matrix_end();
}

}  // namespace metal
