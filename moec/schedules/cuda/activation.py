"""The activation of an expert as a device function: act(gate) * (up + offset), in float32."""

from __future__ import annotations

from ...spec import ActivationSpec, Clamp, Nonlinearity

_GELU_CUBIC = 0.044715
_GELU_SCALE = 1.5957691216057308  # 2 sqrt(2 / pi)
# x * sigmoid(z) = x/2 + x/2 * tanh(z/2) by the tanh instruction: one operation of the special
# function unit instead of the two of an exponential and a division, which the epilogue of a
# matmul has no time for. Its error of 2^-11 is a quarter of the rounding to bfloat16.
_TIMES_SIGMOID = "moec_times_sigmoid({x}, {z})"
_HELPER = """#ifndef MOEC_TIMES_SIGMOID
#define MOEC_TIMES_SIGMOID
__forceinline__ __device__ float moec_times_sigmoid(float x, float z) {
  float t, half = 0.5f * x;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(0.5f * z));
  return fmaf(half, t, half);
}
#endif
"""


def device_function(spec: ActivationSpec, gated: bool) -> tuple[str, str]:
    """(name, CUDA C++ source) of float f(float gate, float up); `up` is unused without gate."""
    body = []
    if spec.clamp is Clamp.BEFORE:
        body.append(f"g = fminf(g, {_literal(spec.limit)});")
    body.append(f"float v = {_nonlinearity(spec)};")
    if spec.clamp is Clamp.AFTER:
        body.append(f"v = fminf(v, {_literal(spec.limit)});")
    if gated:
        if spec.clamp is not Clamp.NONE:
            limit = _literal(spec.limit)
            body.append(f"u = fminf(fmaxf(u, -{limit}), {limit});")
        body.append(f"v *= u + {_literal(spec.up_offset)};" if spec.up_offset else "v *= u;")
    name = "moec_act_" + "_".join(
        [spec.kind.value, spec.clamp.value, "gated" if gated else "plain"]
        + [_word(v) for v in (spec.alpha, spec.limit, spec.up_offset)]
    )
    inner = " ".join(body)
    return (
        name,
        _HELPER
        + f"__forceinline__ __device__ float {name}(float g, float u) {{ {inner} return v; }}\n",
    )


def _nonlinearity(spec: ActivationSpec) -> str:
    kind = spec.kind
    if kind is Nonlinearity.SILU:
        z = "g" if spec.alpha == 1.0 else f"(g * {_literal(spec.alpha)})"
        return _TIMES_SIGMOID.format(x="g", z=z)
    if kind is Nonlinearity.GELU_TANH:
        # (1 + tanh z) / 2 = sigmoid(2z)
        z = f"({_GELU_SCALE}f * fmaf({_GELU_CUBIC}f * g * g, g, g))"
        return _TIMES_SIGMOID.format(x="g", z=z)
    if kind is Nonlinearity.GELU_ERF:
        return "g * 0.5f * (1.0f + erff(g * 0.70710678f))"
    if kind is Nonlinearity.RELU:
        return "fmaxf(g, 0.0f)"
    return "fmaxf(g, 0.0f) * fmaxf(g, 0.0f)"


def _literal(value: float) -> str:
    return f"{float(value)!r}f"


def _word(value: float) -> str:
    return float(value).hex().replace(".", "p").replace("-", "m").replace("+", "")
