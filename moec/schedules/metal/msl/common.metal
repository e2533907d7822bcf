// Storage formats, roundings and functions that every kernel uses. MSL 2.3; safe under fast math.
//
// TVM's Metal runtime compiles with fast math, which may assume that no value is infinite or
// NaN: nothing here tells one by comparing floats, masks are finite, and exponents are clamped.

// A view of `count` elements: an emulator that defines this checks the bounds of the view.
#ifndef MOEC_BOUND
#define MOEC_BOUND(pointer, count) (pointer)
#endif

namespace moec {

constant float LOWEST = -3.4028234e38f;

// A storage format: its scalar and its vector of 4, to and from float, and the element type of
// the matrix tiles that it may be staged in without losing bits.
struct f32 {
  typedef float store;
  typedef float4 store4;
  static float get(float v) { return v; }
  static float4 get4(float4 v) { return v; }
  static float put(float v) { return v; }
  static float round(float v) { return v; }
};

struct f16 {
  typedef half store;
  typedef half4 store4;
  static float get(half v) { return float(v); }
  static float4 get4(half4 v) { return float4(v); }
  static half put(float v) { return half(v); }
  static float round(float v) { return float(half(v)); }
};

// MSL 2.3 has no bfloat: the bits travel as ushort.
struct bf16 {
  typedef ushort store;
  typedef ushort4 store4;
  static float get(ushort v) { return as_type<float>(uint(v) << 16); }
  static float4 get4(ushort4 v) { return as_type<float4>(uint4(v) << 16); }
  static uint bits(float v) {  // rounded to nearest even; a NaN stays one
    uint u = as_type<uint>(v);
    uint rounded = u + 0x7fffu + ((u >> 16) & 1u);
    return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : rounded;
  }
  static ushort put(float v) { return ushort(bits(v) >> 16); }
  static float round(float v) { return as_type<float>(bits(v) & 0xffff0000u); }
};

// Products of halves are exact in float, so half tiles lose nothing when both sides are f16.
// bfloat16 does not fit into half (its range is that of float), so it is staged as float.
template <typename W, typename X> struct staged {
  typedef float type;
  typedef float4 type4;
  static float4 pack(float4 v) { return v; }
};
template <> struct staged<f16, f16> {
  typedef half type;
  typedef half4 type4;
  static half4 pack(float4 v) { return half4(v); }
};

inline float sigmoid(float v) { return 1.0f / (1.0f + exp(clamp(-v, -87.0f, 87.0f))); }

// c * tanh(v / c), with tanh z = 2 sigmoid(2z) - 1.
inline float soft_cap(float v, float c) { return c * (2.0f * sigmoid(2.0f * v / c) - 1.0f); }

// log(1 + x) for x in [0, 1]; the series where 1 + x would lose the digits of x.
inline float log1p_unit(float x) {
  float series = x * (1.0f - x * (0.5f - x * (0.33333333f - x * (0.25f - x * (0.2f - x * 0.16666667f)))));
  return x < 0.0625f ? series : log(1.0f + x);
}

// max(v, 0) + log(1 + e^-|v|): neither side overflows.
inline float softplus(float v) { return max(v, 0.0f) + log1p_unit(exp(-min(fabs(v), 87.0f))); }

// Abramowitz and Stegun 7.1.26, absolute error below 2e-7.
inline float erf(float x) {
  float a = fabs(x);
  float t = 1.0f / (1.0f + 0.3275911f * a);
  float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  float y = 1.0f - p * exp(-min(a * a, 87.0f));
  return x < 0.0f ? -y : y;
}

inline float silu(float g, float alpha) { return g * sigmoid(alpha * g); }
inline float gelu_erf(float g) { return 0.5f * g * (1.0f + erf(g * 0.70710678f)); }
// (1 + tanh z) / 2 = sigmoid(2z); 2 sqrt(2 / pi) = 1.5957691
inline float gelu_tanh(float g) { return g * sigmoid(1.5957691f * (g + 0.044715f * g * g * g)); }

}  // namespace moec
