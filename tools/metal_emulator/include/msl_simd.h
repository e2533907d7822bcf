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
template <class T, class L> T simd_broadcast(T v, L lane) { return detail::pick("simd_broadcast", v, (int)lane); }
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
// Which lane holds which element is not part of the language: kernels must not look. The map
// here is one that public kernels rely on, two neighbouring columns a lane.
namespace detail {
inline int matrix_row(int lane) { return ((lane / 4) & 4) + ((lane / 2) % 4); }
inline int matrix_column(int lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }
inline void uniform(const char* op, const void* p, size_t stride) {
  std::pair<const void*, size_t> mine{p, stride};
  msl::rendezvous(op, &mine, [op](void** all, int n) {
    auto** a = (std::pair<const void*, size_t>**)all;
    if (n != msl::kSimd) msl::fail(std::string(op) + " in a partial SIMD group");
    for (int i = 1; i < n; ++i)
      if (*a[i] != *a[0]) msl::fail(std::string(op) + ": pointer or stride differs between lanes");
  });
}
}  // namespace detail

template <class T, int C, int R> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "only 8x8 exists");
  T e[2];
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;

template <class T, int C, int R, class V> simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(V v) {
  msl::rendezvous("make_filled_simdgroup_matrix", nullptr, [](void**, int) {});
  simdgroup_matrix<T, C, R> m;
  m.e[0] = m.e[1] = T((float)v);
  return m;
}
template <class T, msl::Space S, class P>
void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, msl::ptr<S, P> p, ulong stride = 8, ulong2 origin = ulong2(0ul), bool transpose = false) {
  static_assert(std::is_same<T, std::remove_const_t<P>>::value, "simdgroup_load: element types differ");
  detail::uniform("simdgroup_load", p.at, stride);
  int lane = msl::lane_id();
  for (int k = 0; k < 2; ++k) {
    int r = detail::matrix_row(lane), c = detail::matrix_column(lane) + k;
    if (transpose) std::swap(r, c);
    m.e[k] = p[(origin.y + r) * stride + origin.x + c];
  }
}
template <class T, msl::Space S>
void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, msl::ptr<S, T> p, ulong stride = 8, ulong2 origin = ulong2(0ul), bool transpose = false) {
  detail::uniform("simdgroup_store", p.at, stride);
  int lane = msl::lane_id();
  for (int k = 0; k < 2; ++k) {
    int r = detail::matrix_row(lane), c = detail::matrix_column(lane) + k;
    if (transpose) std::swap(r, c);
    p[(origin.y + r) * stride + origin.x + c] = m.e[k];
  }
}
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c) {
  struct Op {
    simdgroup_matrix<D, 8, 8>* d;
    const simdgroup_matrix<A, 8, 8>* a;
    const simdgroup_matrix<B, 8, 8>* b;
    const simdgroup_matrix<C, 8, 8>* c;
  } mine{&d, &a, &b, &c};
  msl::rendezvous("simdgroup_multiply_accumulate", &mine, [](void** all, int n) {
    if (n != msl::kSimd) msl::fail("simdgroup_multiply_accumulate in a partial SIMD group");
    float fa[8][8], fb[8][8], fc[8][8];
    for (int l = 0; l < 32; ++l)
      for (int k = 0; k < 2; ++k) {
        int r = detail::matrix_row(l), q = detail::matrix_column(l) + k;
        Op* o = (Op*)all[l];
        fa[r][q] = (float)o->a->e[k];
        fb[r][q] = (float)o->b->e[k];
        fc[r][q] = (float)o->c->e[k];
      }
    for (int t = 0; t < 8; ++t)
      for (int r = 0; r < 8; ++r)
        for (int q = 0; q < 8; ++q) fc[r][q] += fa[r][t] * fb[t][q];
    for (int l = 0; l < 32; ++l)
      for (int k = 0; k < 2; ++k)
        ((Op*)all[l])->d->e[k] = D(fc[detail::matrix_row(l)][detail::matrix_column(l) + k]);
    msl::count_mma();
  });
}

}  // namespace metal
