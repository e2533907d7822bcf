"""The peers of bench/cpu.py: each turns weights into a function of inputs, called by set number.

A peer is opened once for a layer, and asked for a `Candidate` at every T. Those that read the
canonical weights (transformers, ggml) share one copy of them; ONNX Runtime and OpenVINO make
their own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from cpu_layers import LAYERS, Inputs

Candidate = Callable[[int], Any]
_BATCHED_MOST = 16  # transformers' batched_mm copies the weights of every (token, expert) pair
_GGML_POLL = 1  # of 100: idle threads sleep within some milliseconds, before the next candidate


class Peer(Protocol):
    """One implementation with its weights bound."""

    name: str

    def at(self, inputs: Inputs) -> Candidate | None:
        """A call on one set of the inputs, or None if it should not run at their T."""


class Transformers:
    """transformers' own experts module with one of its implementations."""

    def __init__(self, layer: str, weights: tuple[Any, Any], implementation: str) -> None:
        import torch
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

        self.name = f"transformers {implementation}"
        experts, top_k, hidden, inner = LAYERS[layer]
        config = OlmoeConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_experts=experts,
            num_experts_per_tok=top_k,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            self.module = OlmoeExperts(config)
        gate_up, down = map(to_torch, weights)
        self.module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
        self.module.down_proj = torch.nn.Parameter(down, requires_grad=False)
        self.most = _BATCHED_MOST if "batched" in implementation else None

    def at(self, inputs: Inputs) -> Candidate | None:
        import torch

        if self.most is not None and len(inputs.x[0]) > self.most:
            return None
        xs = list(map(to_torch, inputs.x))
        ids = [torch.from_numpy(i).long() for i in inputs.ids]
        weights = [torch.from_numpy(w).to(xs[0].dtype) for w in inputs.weights]
        return lambda i: self.module(xs[i], ids[i], weights[i])


class OnnxRuntime:
    """ONNX Runtime's com.microsoft.MoE in float32, its weights as constants that it may pack.

    It selects the experts itself, from logits that leave it no choice.
    """

    name = "onnxruntime MoE"

    def __init__(self, layer: str, weights: tuple[Any, Any], threads: int) -> None:
        import onnxruntime
        from onnx import TensorProto, helper

        experts, top_k, hidden, _ = LAYERS[layer]
        gate_up, down = weights
        # Gate and up rows in turn: the layout of its fused swiglu, which here is silu(gate) * up.
        gate, up = np.split(gate_up, 2, axis=1)
        constants = {"fc1": np.stack([gate, up], 2).reshape(gate_up.shape), "fc2": down}
        operands = ["input", "router_probs", "fc1", "", "fc2"]
        node = helper.make_node(
            "MoE", operands, ["y"], domain="com.microsoft", k=top_k, activation_type="swiglu",
            swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0, swiglu_limit=1e30,
            normalize_routing_weights=1,
        )  # fmt: skip
        tokens, kind = "tokens", TensorProto.FLOAT
        graph = helper.make_graph(
            [node],
            "moe",
            [
                helper.make_tensor_value_info("input", kind, [tokens, hidden]),
                helper.make_tensor_value_info("router_probs", kind, [tokens, experts]),
            ],
            [helper.make_tensor_value_info("y", kind, [tokens, hidden])],
        )
        for name, array in constants.items():
            tensor = graph.initializer.add()
            tensor.name, tensor.data_type = name, kind
            tensor.dims.extend(array.shape)
            # Handed over below: a model file cannot hold more than 2 GB.
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="handed-over")
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a))
                  for a in constants.values()]  # fmt: skip
        options.add_external_initializers(list(constants), values)
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def at(self, inputs: Inputs) -> Candidate | None:
        feeds = [
            {"input": x, "router_probs": logits}
            for x, logits in zip(inputs.x, inputs.logits, strict=True)
        ]
        return lambda i: self.session.run(None, feeds[i])[0]


class Ggml:
    """llama.cpp's graph of the experts on ggml's CPU backend, built by bench/ggml/build.py.

    Its activations are float32; inputs are put into its graph before the clock starts.
    """

    name = "ggml"

    def __init__(self, layer: str, weights: tuple[Any, Any], threads: int, folder: Path) -> None:
        experts, self.top_k, self.hidden, inner = LAYERS[layer]
        self.library = ctypes.CDLL(str(folder / "build" / "libmoec_ggml.so"))
        for name in ("layer", "graph", "result"):
            getattr(self.library, f"moec_ggml_{name}").restype = ctypes.c_void_p
        self.weights = weights  # borrowed by the layer
        bf16 = weights[0].dtype == ml_dtypes.bfloat16
        self.layer = ctypes.c_void_p(
            self.library.moec_ggml_layer(
                experts, self.hidden, inner, int(bf16), threads, _GGML_POLL, *map(_pointer, weights)
            )
        )

    def at(self, inputs: Inputs) -> Candidate | None:
        graphs = _Graphs(self, inputs)
        return graphs.run


class _Graphs:
    def __init__(self, peer: Ggml, inputs: Inputs) -> None:
        self.peer, self.shape = peer, (len(inputs.x[0]), peer.hidden)
        self.graphs = [
            self._graph(*sets) for sets in zip(inputs.x, inputs.ids, inputs.weights, strict=True)
        ]

    def _graph(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> ctypes.c_void_p:
        x = x.astype(np.float32)
        given = map(_pointer, (x, ids, weights))
        return ctypes.c_void_p(
            self.peer.library.moec_ggml_graph(self.peer.layer, len(x), self.peer.top_k, *given)
        )

    def run(self, i: int) -> np.ndarray:
        graph = self.graphs[i]
        if self.peer.library.moec_ggml_run(self.peer.layer, graph):
            raise SystemExit("ggml refused to compute")
        place = self.peer.library.moec_ggml_result(graph)
        size = self.shape[0] * self.shape[1]
        return np.frombuffer((ctypes.c_float * size).from_address(place), np.float32).reshape(
            self.shape
        )

    def __del__(self) -> None:
        for graph in self.graphs:
            self.peer.library.moec_ggml_graph_free(graph)


class OpenVino:
    """OpenVINO's CPU plugin, with the graph that it turns into its GatherMatmul kernels.

    That graph computes every expert for every token and masks; the plugin recognises it, which
    is checked here, since without it all E experts would run.
    """

    name = "openvino"

    def __init__(self, layer: str, weights: tuple[Any, Any], threads: int) -> None:
        import openvino

        experts, top_k, hidden, _ = LAYERS[layer]
        gate, up = (np.ascontiguousarray(half) for half in np.split(weights[0], 2, axis=1))
        self.weights = (gate, up, weights[1])  # borrowed by the model
        model = _openvino_model(experts, top_k, hidden, self.weights)
        bf16 = weights[0].dtype == ml_dtypes.bfloat16
        config = {
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }
        compiled = openvino.Core().compile_model(model, "CPU", config)
        kinds = [
            node.get_rt_info()["layerType"].astype(str)
            for node in compiled.get_runtime_model().get_ops()
        ]
        if kinds.count("GatherMatmul") != 3:
            raise SystemExit("this OpenVINO does not recognise the experts' graph")
        self.request = compiled.create_infer_request()

    def at(self, inputs: Inputs) -> Candidate | None:
        feeds = [
            {"x": x.astype(np.float32)[None], "ids": ids, "weights": weights}
            for x, ids, weights in zip(inputs.x, inputs.ids, inputs.weights, strict=True)
        ]
        return lambda i: self.request.infer(feeds[i], share_inputs=True, share_outputs=True)[0]


def _openvino_model(experts: int, top_k: int, hidden: int, weights: tuple[Any, Any, Any]) -> Any:
    import openvino as ov
    import openvino.opset12 as op
    from openvino.utils.node_factory import NodeFactory

    def const(values: Any, dtype: Any = np.int64) -> Any:
        return op.constant(np.array(values, dtype))

    def weight(array: np.ndarray) -> Any:
        if array.dtype == np.float32:
            return ov.op.Constant(array, shared_memory=True)
        tensor = ov.Tensor(array.view(np.uint16), list(array.shape), ov.Type.bf16)
        return op.convert(ov.op.Constant(tensor, shared_memory=True), "f32")

    def times(rows: Any, array: np.ndarray) -> Any:
        return op.matmul(rows, weight(array), False, True)

    gate, up, down = weights
    x = op.parameter(ov.PartialShape([-1, -1, hidden]), np.float32, name="x")
    ids = op.parameter(ov.PartialShape([-1, top_k]), np.int32, name="ids")
    routed = op.parameter(ov.PartialShape([-1, top_k]), np.float32, name="weights")
    rows = op.tile(op.reshape(x, const([-1, hidden]), False), const([experts, 1]))
    rows = op.reshape(rows, const([experts, -1, hidden]), False)
    # op.swish would give Swish a second input, which the plugin's pattern does not have.
    gated = NodeFactory("opset4").create("Swish", [times(rows, gate).output(0)], {})
    each = times(op.multiply(gated, times(rows, up)), down)
    tokens = op.gather(op.shape_of(ids), const([0]), const(0))
    zeros = op.broadcast(const([0], np.float32), op.concat([tokens, const([experts])], 0))
    dense = op.transpose(op.scatter_elements_update(zeros, ids, routed, const([1])), const([1, 0]))
    shape = [const([experts]), tokens, const([-1])]
    dense = op.unsqueeze(op.reshape(dense, op.concat(shape, 0), True), const([3]))
    each = op.reshape(each, op.concat([*shape, const([hidden])], 0), True)
    y = op.reduce_sum(op.multiply(each, dense), const([0]), False)
    return ov.Model([op.reshape(y, const([-1, hidden]), False)], [x, ids, routed], "experts")


def to_torch(array: np.ndarray) -> Any:
    """The same memory as a torch tensor."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _pointer(array: np.ndarray) -> Any:
    return ctypes.c_void_p(array.ctypes.data)


TRANSFORMERS = ("eager", "grouped_mm", "batched_mm")
NAMES = (*TRANSFORMERS, "onnxruntime", "ggml", "openvino")


def open_peers(
    names: list[str], layer: str, weights: tuple[Any, Any], threads: int, ggml: Path | None
) -> list[Peer]:
    """The peers of `names` that take weights of this dtype."""
    peers: list[Peer] = []
    for name in names:
        if name in TRANSFORMERS:
            peers.append(Transformers(layer, weights, name))
        elif name == "onnxruntime" and weights[0].dtype == np.float32:
            peers.append(OnnxRuntime(layer, weights, threads))
        elif name == "ggml" and ggml is not None:
            peers.append(Ggml(layer, weights, threads, ggml))
        elif name == "openvino":
            peers.append(OpenVino(layer, weights, threads))
    return peers
