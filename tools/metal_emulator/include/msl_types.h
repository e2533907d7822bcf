// half, vectors and their arithmetic, as the Metal Shading Language defines them.
#pragma once
#ifdef __F16C__
#include <immintrin.h>
#endif
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "msl_fiber.h"

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

namespace metal {

// ---------------------------------------------------------------- half
namespace detail {
#ifdef __F16C__
inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t float_to_half(float f) { return _cvtss_sh(f, 0); }
#else
inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  if (exponent == 0) {
    float f = std::ldexp((float)fraction, -24);
    return sign ? -f : f;
  }
  uint32_t bits = exponent == 31 ? (sign | 0x7f800000u | (fraction << 13))
                                 : (sign | ((exponent + 112) << 23) | (fraction << 13));
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t float_to_half(float f) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00;
  if (bits >= 0x477ff000u) return sign | 0x7c00;
  if (bits < 0x38800000u) {
    float a;
    std::memcpy(&a, &bits, 4);
    return sign | (uint16_t)std::nearbyint(std::ldexp(a, 24));
  }
  uint32_t r = bits - 0x38000000u;
  r += 0xfff + ((r >> 13) & 1);
  return sign | (uint16_t)(r >> 13);
}
#endif
}  // namespace detail

struct half {
  uint16_t bits;
  half() = default;
  template <class A, std::enable_if_t<std::is_arithmetic<A>::value, int> = 0>
  half(A a) : bits(detail::float_to_half((float)a)) {}
  operator float() const { return detail::half_to_float(bits); }
  half operator-() const { return half(-(float)*this); }
#define MSL_OP(o)                                                                      \
  friend half operator o(half a, half b) { return half((float)a o(float) b); }         \
  template <class I, std::enable_if_t<std::is_integral<I>::value, int> = 0>            \
  friend half operator o(half a, I b) { return a o half(b); }                          \
  template <class F, std::enable_if_t<std::is_floating_point<F>::value, int> = 0>      \
  friend float operator o(half a, F b) { return (float)a o(float) b; }                 \
  template <class F, std::enable_if_t<std::is_floating_point<F>::value, int> = 0>      \
  friend float operator o(F a, half b) { return (float)a o(float) b; }
  MSL_OP(+) MSL_OP(-) MSL_OP(*) MSL_OP(/)
#undef MSL_OP
  half& operator+=(half o) { return *this = *this + o; }
};
inline half operator""h(long double v) { return half((float)v); }
inline half operator""h(unsigned long long v) { return half((float)v); }

// ---------------------------------------------------------------- vectors
namespace detail {
template <class T, int N> struct Store;
template <class T> struct alignas(2 * sizeof(T)) Store<T, 2> {
  union { T v[2]; struct { T x, y; }; };
  Store() {}
};
template <class T> struct alignas(4 * sizeof(T)) Store<T, 3> {
  union { T v[3]; struct { T x, y, z; }; };
  Store() {}
};
template <class T> struct alignas(4 * sizeof(T)) Store<T, 4> {
  union { T v[4]; struct { T x, y, z, w; }; };
  Store() {}
};
}  // namespace detail

template <class T, int N>
struct vec : detail::Store<T, N> {
  typedef detail::Store<T, N> B;
  vec() = default;
  vec(T s) { for (int i = 0; i < N; ++i) B::v[i] = s; }
  template <class... A, std::enable_if_t<sizeof...(A) == N && (N > 1), int> = 0>
  vec(A... a) { T t[] = {(T)a...}; for (int i = 0; i < N; ++i) B::v[i] = t[i]; }
  template <class U, std::enable_if_t<!std::is_same<U, T>::value, int> = 0>
  explicit vec(const vec<U, N>& o) { for (int i = 0; i < N; ++i) B::v[i] = (T)o.v[i]; }
  T& operator[](size_t i) { if (i >= N) msl::fail("vector subscript out of range"); return B::v[i]; }
  const T& operator[](size_t i) const { if (i >= N) msl::fail("vector subscript out of range"); return B::v[i]; }
};
#define MSL_OP(o)                                                                              \
  template <class T, int N> vec<T, N> operator o(const vec<T, N>& a, const vec<T, N>& b) {     \
    vec<T, N> r; for (int i = 0; i < N; ++i) r.v[i] = (T)(a.v[i] o b.v[i]); return r; }        \
  template <class T, int N> vec<T, N> operator o(const vec<T, N>& a, std::common_type_t<T> b) { \
    vec<T, N> r; for (int i = 0; i < N; ++i) r.v[i] = (T)(a.v[i] o b); return r; }             \
  template <class T, int N> vec<T, N> operator o(std::common_type_t<T> a, const vec<T, N>& b) { \
    vec<T, N> r; for (int i = 0; i < N; ++i) r.v[i] = (T)(a o b.v[i]); return r; }             \
  template <class T, int N> vec<T, N>& operator o##=(vec<T, N>& a, const vec<T, N>& b) { return a = a o b; }
MSL_OP(+) MSL_OP(-) MSL_OP(*) MSL_OP(/) MSL_OP(%) MSL_OP(&) MSL_OP(|) MSL_OP(^) MSL_OP(<<) MSL_OP(>>)
#undef MSL_OP
#define MSL_OP(o)                                                                              \
  template <class T, int N> vec<bool, N> operator o(const vec<T, N>& a, const vec<T, N>& b) {  \
    vec<bool, N> r; for (int i = 0; i < N; ++i) r.v[i] = a.v[i] o b.v[i]; return r; }
MSL_OP(<) MSL_OP(>) MSL_OP(<=) MSL_OP(>=) MSL_OP(==) MSL_OP(!=)
#undef MSL_OP
template <class T, int N> vec<T, N> operator-(const vec<T, N>& a) {
  vec<T, N> r; for (int i = 0; i < N; ++i) r.v[i] = -a.v[i]; return r;
}
#define MSL_VECTORS(t) typedef vec<t, 2> t##2; typedef vec<t, 3> t##3; typedef vec<t, 4> t##4;
MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(char) MSL_VECTORS(uchar) MSL_VECTORS(short)
MSL_VECTORS(ushort) MSL_VECTORS(int) MSL_VECTORS(uint) MSL_VECTORS(long) MSL_VECTORS(ulong)
MSL_VECTORS(bool)
#undef MSL_VECTORS

template <class T, class U> T as_type(const U& u) {
  static_assert(sizeof(T) == sizeof(U), "as_type: sizes differ");
  T t;
  std::memcpy((void*)&t, (const void*)&u, sizeof t);
  return t;
}

// ---------------------------------------------------------------- mathematics
#define MSL_UNARY(n)                                                       \
  inline float n(float x) { return std::n(x); }                            \
  inline half n(half x) { return half(std::n((float)x)); }                 \
  template <class T, int N> vec<T, N> n(vec<T, N> a) { for (int i = 0; i < N; ++i) a.v[i] = n(a.v[i]); return a; }
MSL_UNARY(exp) MSL_UNARY(exp2) MSL_UNARY(log) MSL_UNARY(log2) MSL_UNARY(sqrt) MSL_UNARY(floor)
MSL_UNARY(ceil) MSL_UNARY(trunc) MSL_UNARY(round) MSL_UNARY(rint) MSL_UNARY(tanh) MSL_UNARY(fabs)
#undef MSL_UNARY
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline float pow(float a, float b) { return std::pow(a, b); }
inline float fmod(float a, float b) { return std::fmod(a, b); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
template <class T> T max(T a, T b) { return a < b ? b : a; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
template <class T> T abs(T x) { return x < T(0) ? T(-x) : x; }
template <class T> T select(T a, std::common_type_t<T> b, bool c) { return c ? b : a; }
template <class T, int N> T dot(vec<T, N> a, vec<T, N> b) {
  T s = a.v[0] * b.v[0];
  for (int i = 1; i < N; ++i) s = s + a.v[i] * b.v[i];
  return s;
}

}  // namespace metal
