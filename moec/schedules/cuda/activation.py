"""The activation of an expert as a device function: act(gate) * (up + offset), in float32."""

from __future__ import annotations

from ...spec import ActivationSpec, Clamp, Nonlinearity

_GELU_CUBIC = 0.044715
_GELU_SCALE = 1.5957691216057308  # 2 sqrt(2 / pi)
# x * sigmoid(z) = x/2 + x/2 * tanh(z/2) by the tanh instruction: one operation of the special
# function unit instead of the two of an exponential and a division, which the epilogue of a
# matmul has no time for. Its error of 2^-11 is a quarter of the rounding to bfloat16.
_TIMES_SIGMOID = "moec_times_sigmoid({x}, {z})"
# Where the result stays float32 that error would show: an exponential and a division.
_EXACT = "({x} / (1.0f + expf(-{z})))"
_HELPER = """#ifndef MOEC_TIMES_SIGMOID
#define MOEC_TIMES_SIGMOID
__forceinline__ __device__ float moec_times_sigmoid(float x, float z) {
  float t, half = 0.5f * x;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(0.5f * z));
  return fmaf(half, t, half);
}
#endif
"""


def device_function(spec: ActivationSpec, gated: bool, exact: bool = False) -> tuple[str, str]:
    """(name, CUDA C++ source) of float f(float gate, float up); `up` is unused without gate.

    `exact`: to some units in the last place of float32, for results that are not rounded.
    """
    body = []
    if spec.clamp is Clamp.BEFORE:
        body.append(f"g = fminf(g, {_literal(spec.limit)});")
    body.append(f"float v = {_nonlinearity(spec, exact)};")
    if spec.clamp is Clamp.AFTER:
        body.append(f"v = fminf(v, {_literal(spec.limit)});")
    if gated:
        if spec.clamp is not Clamp.NONE:
            limit = _literal(spec.limit)
            body.append(f"u = fminf(fmaxf(u, -{limit}), {limit});")
        if spec.up_cap is not None:
            body.append(f"u = {_cap('u', spec.up_cap)};")
        body.append(f"v *= u + {_literal(spec.up_offset)};" if spec.up_offset else "v *= u;")
    name = "moec_act_" + "_".join(
        [spec.kind.value, spec.clamp.value, "gated" if gated else "plain"]
        + [_word(v) for v in (spec.alpha, spec.limit, spec.up_offset)]
        + [_word(v or 0.0) for v in (spec.gate_cap, spec.up_cap)]
        + ["exact"] * exact
    )
    inner = " ".join(body)
    return (
        name,
        _HELPER
        + f"__forceinline__ __device__ float {name}(float g, float u) {{ {inner} return v; }}\n",
    )


def _nonlinearity(spec: ActivationSpec, exact: bool) -> str:
    kind, times_sigmoid = spec.kind, _EXACT if exact else _TIMES_SIGMOID
    if kind is Nonlinearity.SILU:
        z = "g" if spec.alpha == 1.0 else f"(g * {_literal(spec.alpha)})"
        x = "g" if spec.gate_cap is None else _cap("g", spec.gate_cap)
        return times_sigmoid.format(x=x, z=z)
    if kind is Nonlinearity.GELU_TANH:
        # (1 + tanh z) / 2 = sigmoid(2z)
        z = f"({_GELU_SCALE}f * fmaf({_GELU_CUBIC}f * g * g, g, g))"
        return times_sigmoid.format(x="g", z=z)
    if kind is Nonlinearity.GELU_ERF:
        return "g * 0.5f * (1.0f + erff(g * 0.70710678f))"
    if kind is Nonlinearity.RELU:
        return "fmaxf(g, 0.0f)"
    return "fmaxf(g, 0.0f) * fmaxf(g, 0.0f)"


def _cap(value: str, limit: float) -> str:
    """The soft cap: limit * tanh(value / limit)."""
    return f"({_literal(limit)} * tanhf({value} / {_literal(limit)}))"


def _literal(value: float) -> str:
    return f"{float(value)!r}f"


def _word(value: float) -> str:
    return float(value).hex().replace(".", "p").replace("-", "m").replace("+", "")
