"""An oracle from outside: ONNX Runtime's com.microsoft.MoE on the CPU, in float32.

It knows swiglu with gate and up interleaved, clamped and with an offset (gpt-oss), and plain
experts without gate. 1e-5 of the norm: both sides sum in float32 in an order of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests.blocks import Built, error, inputs
from tests.compiler.cases import CASES

Array = np.ndarray[Any, Any]

# Our case -> the attributes that say the same to ONNX Runtime (its gelu is the tanh form).
SAME = {
    "clamped swiglu": {
        "activation_type": "swiglu", "swiglu_fusion": 1, "swiglu_limit": 0.8,
        "activation_alpha": 1.7, "activation_beta": 1.0,
    },
    "no gate": {"activation_type": "gelu"},
    "softmax of the selected": {"activation_type": "relu", "normalize_routing_weights": 1},
}  # fmt: skip


def interleaved(stacked: Array) -> Array:
    """[E, 2I, ...] with gate rows first -> gate and up rows in turn."""
    gate, up = np.split(stacked, 2, axis=1)
    return np.stack([gate, up], 2).reshape(stacked.shape)


def session(feeds: dict[str, Array], top_k: int, attributes: dict[str, Any]) -> Any:
    """One MoE node with all its operands as inputs; biases may be absent."""
    names = ["input", "router_probs", "fc1", "fc1_bias", "fc2", "fc2_bias"]
    operands = [name if name in feeds else "" for name in names]
    node = helper.make_node("MoE", operands, ["y"], domain="com.microsoft", k=top_k, **attributes)
    infos = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
        for name, array in {**feeds, "y": feeds["input"]}.items()
    }
    result = infos.pop("y")
    graph = helper.make_graph([node], "moe", list(infos.values()), [result])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_moe(cpu: Built, name: str, tokens: int) -> None:
    n = list(CASES).index(name)
    small, spec = cpu.blocks[n], cpu.blocks[n].spec
    p = small.parameters
    change = interleaved if spec.experts.gated else lambda array: array
    x, _, _ = inputs(spec, tokens, 21)
    feeds = {
        "input": x,
        "router_probs": (x.astype(np.float64) @ p["router"].T.astype(np.float64)).astype("f4"),
        "fc1": change(p["gate_up"]),
        "fc2": p["down"],
    }
    if spec.experts.gate_up_bias:
        feeds["fc1_bias"] = change(p["gate_up_bias"])
    if spec.experts.down_bias:
        feeds["fc2_bias"] = p["down_bias"]
    (want,) = session(feeds, spec.experts.top_k, SAME[name]).run(None, feeds)
    for schedule in small.schedules:
        assert error(cpu.loaded[n](x, schedule=schedule), want) <= 1e-5
