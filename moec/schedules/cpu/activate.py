"""The activation of an expert on vectors in registers: act(gate) * (up + offset)."""

from __future__ import annotations

import math
from typing import Any

from ...spec import ActivationSpec, Clamp, Nonlinearity
from .emit import Emit

_GELU_CUBIC = 0.044715
_GELU_SCALE = 2.0 * math.sqrt(2.0 / math.pi)


def nonlinearity(em: Emit, spec: ActivationSpec, g: Any) -> Any:
    """f(g); gelu_tanh is written with a sigmoid: (1 + tanh z) / 2 = sigmoid(2z)."""
    if spec.kind is Nonlinearity.SILU:
        inner = g if spec.alpha == 1.0 else g * em.splat(spec.alpha)
        linear = g if spec.gate_cap is None else em.soft_cap(g, spec.gate_cap)
        return em.bind(linear * em.sigmoid(inner))
    if spec.kind is Nonlinearity.GELU_TANH:
        cubic = em.fma(g * g * g, em.splat(_GELU_CUBIC), g)
        return em.bind(g * em.sigmoid(em.splat(_GELU_SCALE) * cubic))
    if spec.kind is Nonlinearity.GELU_ERF:
        half = em.splat(0.5)
        return em.bind(g * half * (em.splat(1.0) + em.erf(g * em.splat(math.sqrt(0.5)))))
    positive = em.bind(em.at_least(g, 0.0))
    if spec.kind is Nonlinearity.RELU:
        return positive
    return em.bind(positive * positive)  # relu2


def activate(em: Emit, spec: ActivationSpec, gate: Any, up: Any | None) -> Any:
    """The activation of one vector; `up` is None in a layer without gate."""
    gate = em.bind(gate)
    if spec.clamp is Clamp.BEFORE:
        gate = em.bind(em.at_most(gate, spec.limit))
    value = nonlinearity(em, spec, gate)
    if spec.clamp is Clamp.AFTER:
        value = em.bind(em.at_most(value, spec.limit))
    if up is None:
        return value
    if spec.clamp is not Clamp.NONE:
        up = em.at_most(em.at_least(up, -spec.limit), spec.limit)
    if spec.up_cap is not None:
        up = em.soft_cap(up, spec.up_cap)
    if spec.up_offset:
        up = up + em.splat(spec.up_offset)
    return em.bind(value * up)
