// Declarations of MSL 2.3 for clang's C++ for OpenCL: what moec's kernels and TVM emit.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define threadgroup __local
#define thread __private
#define constant __constant
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
#define MSL_VECTORS(t)                                    \
  typedef t t##2 __attribute__((ext_vector_type(2)));     \
  typedef t t##3 __attribute__((ext_vector_type(3)));     \
  typedef t t##4 __attribute__((ext_vector_type(4)));
MSL_VECTORS(float) MSL_VECTORS(half) MSL_VECTORS(char) MSL_VECTORS(uchar) MSL_VECTORS(short)
MSL_VECTORS(ushort) MSL_VECTORS(int) MSL_VECTORS(uint) MSL_VECTORS(long) MSL_VECTORS(ulong)
#undef MSL_VECTORS

namespace metal {
template <class T> struct cast {};
#define MSL_FROM(t)                                                                                        \
  template <class T> T operator->*(cast<T>, t##2 v) { return __builtin_convertvector(v, T); }              \
  template <class T> T operator->*(cast<T>, t##3 v) { return __builtin_convertvector(v, T); }              \
  template <class T> T operator->*(cast<T>, t##4 v) { return __builtin_convertvector(v, T); }              \
  template <class T> T operator->*(cast<T>, t v) { return (T)v; }
MSL_FROM(float) MSL_FROM(half) MSL_FROM(char) MSL_FROM(uchar) MSL_FROM(short) MSL_FROM(ushort)
MSL_FROM(int) MSL_FROM(uint) MSL_FROM(long) MSL_FROM(ulong)
#undef MSL_FROM
// Constructors of vectors: from a vector (converted), one scalar (splat), or all elements.
#define MSL_MAKE(t)                                                                        \
  template <class U> t##2 make_##t##2(U v) { return cast<t##2>()->*v; }                    \
  template <class U> t##3 make_##t##3(U v) { return cast<t##3>()->*v; }                    \
  template <class U> t##4 make_##t##4(U v) { return cast<t##4>()->*v; }                    \
  inline t##2 make_##t##2(t a, t b) { return (t##2)(a, b); }                               \
  inline t##3 make_##t##3(t a, t b, t c) { return (t##3)(a, b, c); }                       \
  inline t##4 make_##t##4(t a, t b, t c, t d) { return (t##4)(a, b, c, d); }
MSL_MAKE(float) MSL_MAKE(half) MSL_MAKE(char) MSL_MAKE(uchar) MSL_MAKE(short) MSL_MAKE(ushort)
MSL_MAKE(int) MSL_MAKE(uint) MSL_MAKE(long) MSL_MAKE(ulong)
#undef MSL_MAKE

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
template <class T, class U> T as_type(U u) {
  static_assert(sizeof(T) == sizeof(U), "as_type: sizes differ");
  return __builtin_bit_cast(T, u);
}
#define MSL_UNARY(n) float n(float); half n(half); float2 n(float2); float4 n(float4);
MSL_UNARY(exp) MSL_UNARY(exp2) MSL_UNARY(log) MSL_UNARY(log2) MSL_UNARY(sqrt) MSL_UNARY(rsqrt)
MSL_UNARY(floor) MSL_UNARY(ceil) MSL_UNARY(trunc) MSL_UNARY(round) MSL_UNARY(rint)
MSL_UNARY(tanh) MSL_UNARY(fabs) MSL_UNARY(abs)
#undef MSL_UNARY
int abs(int);
#define MSL_BINARY(n) float n(float, float); int n(int, int); long n(long, long); uint n(uint, uint); half n(half, half); float4 n(float4, float4);
MSL_BINARY(min) MSL_BINARY(max)
#undef MSL_BINARY
float pow(float, float);
float fmod(float, float);
float fma(float, float, float);
float clamp(float, float, float);
int clamp(int, int, int);
float dot(float4, float4);
float dot(float2, float2);
template <class T> T select(T, T, bool);

template <class T> T simd_sum(T);
template <class T> T simd_max(T);
template <class T> T simd_min(T);
template <class T> T simd_prefix_inclusive_sum(T);
template <class T> T simd_prefix_exclusive_sum(T);
template <class T> T simd_shuffle(T, ushort);
template <class T> T simd_broadcast(T, ushort);
template <class T> T simd_shuffle_up(T, ushort);
template <class T> T simd_shuffle_down(T, ushort);
template <class T> T simd_shuffle_xor(T, ushort);
template <class T, int C, int R> struct simdgroup_matrix { T e[2]; };
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
template <class T, int C, int R> simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T);
#define MSL_MATRIX(space)                                                                                                \
  template <class T, int C, int R> void simdgroup_load(thread simdgroup_matrix<T, C, R>&, const space T*, ulong = 8,     \
                                                       ulong2 = 0, bool = false);                                        \
  template <class T, int C, int R> void simdgroup_store(simdgroup_matrix<T, C, R>, space T*, ulong = 8, ulong2 = 0, bool = false);
MSL_MATRIX(device) MSL_MATRIX(threadgroup)
#undef MSL_MATRIX
template <class D, class A, class B, class E>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>, simdgroup_matrix<E, 8, 8>);
}  // namespace metal
