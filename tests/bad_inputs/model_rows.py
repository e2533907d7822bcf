"""Configs and tensors that are readable but contradict themselves or each other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.bad_inputs.rows import DOWN, ROUTER, SINGLE, UP, Damage, Row, outside, replaced
from tests.checkpoint import raw
from tests.frontend import small


def config(**changes: Any) -> Damage:
    return lambda path: (path / "config.json").write_text(json.dumps(small.config(**changes)))


def config_text(data: str | bytes) -> Damage:
    raw_bytes = data if isinstance(data, bytes) else data.encode()
    return lambda path: (path / "config.json").write_bytes(raw_bytes)


DEEPSEEK = {
    "model_type": "deepseek_v3", "decoder_sparse_step": KeyError, "mlp_only_layers": KeyError,
    "num_experts": KeyError, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 0, "n_shared_experts": 0, "routed_scaling_factor": 1.0,
}  # fmt: skip
E, K, H, I = "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size"
CONFIG_FILE = {
    "missing": (lambda p: (p / "config.json").unlink(), "the file config.json is missing"),
    "not JSON": (config_text("{"), "not JSON"),
    "not UTF-8": (config_text(b"\xff"), "not UTF-8 at byte 0"),
    "empty": (config_text(""), "not JSON"),
    "list": (config_text("[]"), "holds a list, not an object"),
    "nested": (config_text('{"a":' * 99_999), "nested too deeply"),
    "key twice": (config_text('{"model_type": "a", "model_type": "b"}'), "occurs twice"),
    "too large": (lambda p: os.truncate(p / "config.json", (1 << 20) + 1), "1048577 bytes are too"),
    "fifo": (replaced(os.mkfifo, "config.json"), "not a regular file"),
    "link outside": (replaced(outside, "config.json"), "config.json is a link that leaves"),
}  # fmt: skip
CONFIG: dict[str, Row] = {
    **{
        f"{field} {kind}": Row(config(**{field: value}), f"{field}", "config.json",
                               ("a positive integer",))
        for field in (E, K, H, I)
        for kind, value in {"missing": KeyError, "negative": -8, "bool": True, "float": 8.0}.items()
    },
    "K over E": Row(config(**{K: 5}), "5 experts per token cannot be chosen of 4", "config.json",
                    (f"{K} = 5",)),
    "K zero": Row(config(**{K: 0}), f"{K}: 0 is not valid", "config.json"),
    "K over 64": Row(config(**{K: 65}), "65 is outside [1, 64]", "config.json", (f"{K} = 65",)),
    "E over 65536": Row(config(**{E: 65537, "num_hidden_layers": 1}), "65537 is outside [1, 65536]",
                        "config.json", (E,)),
    "too many layers": Row(config(num_hidden_layers=10**9), "is more than any model has",
                           "config.json", ("num_hidden_layers",)),
    "n_group does not divide": Row(config(**{**DEEPSEEK, "n_group": 3}),
                                   "3 groups do not divide 4 experts", "config.json", ("n_group",)),
    "topk_group over n_group": Row(config(**{**DEEPSEEK, "topk_group": 3}),
                                   "3 groups cannot be kept of 2", "config.json", ("topk_group",)),
    "model_type": Row(config(model_type="grok9"), "the model type 'grok9' is not known",
                      "config.json", ("--family FILE", "nearest")),
    "model_type refused": Row(config(model_type="switch_transformers"), "is not supported: experts",
                              "config.json"),
    "scoring function": Row(config(**DEEPSEEK, scoring_func="softmax"),
                            "scoring_func: 'softmax' is not known", "config.json", ("'sigmoid'",)),
    "activation": Row(config(hidden_act="snake"), "hidden_act: 'snake' is not known", "config.json",
                      ("silu",)),
    "field not understood": Row(config(num_zero_experts=2), "num_zero_experts: not understood",
                                "config.json", ("--family FILE",)),
    "product": Row(config(num_hidden_layers=1, **{E: 65536, H: 8192, I: 2048}),
                   "E * I * H overflows 2^40", "config.json", (f"{E} / num_local_experts = 6",)),
    "no MoE layer": Row(config(mlp_only_layers=[0, 1]), "none of the 2 layers is an MoE layer",
                        "config.json", ("mlp_only_layers = [0, 1]",)),
    "dtype": Row(config(dtype="float8_e4m3fn"), "dtype: 'float8_e4m3fn' is not supported",
                 "config.json", ("float32 or bfloat16 or float16",)),
    "quantized": Row(config(quantization_config={"quant_method": "fp9"}),
                     "quantization_config: 'fp9' weights are not supported", "config.json"),
}  # fmt: skip


def arrays(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Write the tensors anew after a change."""

    def damage(path: Path) -> None:
        made = small.tensors()
        change(made)
        save_file({n: np.ascontiguousarray(a) for n, a in made.items()}, path / SINGLE)

    return damage


def unfused(tensors: dict[str, Any]) -> None:
    """Stacks of the right names in which gate and up are not fused."""
    for name in [n for n in tensors if ".experts." in n]:
        del tensors[name]
    for layer in range(small.L):
        base = f"model.layers.{layer}.mlp.experts."
        tensors[f"{base}gate_up_proj"] = raw.f32(small.E, small.I, small.H)
        tensors[f"{base}down_proj"] = raw.f32(small.E, small.H, small.I)


def without_layer(tensors: dict[str, Any]) -> None:
    for name in [n for n in tensors if n.startswith("model.layers.0.")]:
        del tensors[name]


WEIGHTS: dict[str, Row] = {
    "missing expert": Row(arrays(lambda t: t.pop(UP)), f"tensor {UP!r} is missing", "model",
                          ("[6, 8] float32",)),
    "missing router": Row(arrays(lambda t: t.pop(ROUTER)), f"tensor {ROUTER!r} is missing", "model",
                          ("[4, 8] float32",)),
    "extra expert": Row(arrays(lambda t: t.update({small.expert(1, 4, "up"): t[UP]})),
                        f"tensor {small.expert(1, 4, 'up')!r} [6, 8] float32 is not used", SINGLE),
    "shape": Row(arrays(lambda t: t.update({DOWN: t[DOWN].T})),
                 f"tensor {DOWN!r} has the shape [6, 8]", SINGLE, ("[8, 6] float32",)),
    "not fused": Row(arrays(unfused), "experts.gate_up_proj' has the shape [4, 6, 8]", SINGLE,
                     ("[4, 12, 8] float32",)),
    "mixed dtypes": Row(arrays(lambda t: t.update({UP: t[UP].astype("f2")})),
                        f"tensor {UP!r} of gate_up is float16", SINGLE, ("[6, 8] float32",)),
    "unsupported dtype": Row(arrays(lambda t: t.update({UP: t[UP].astype("i4")})),
                             f"tensor {UP!r} has the unsupported dtype int32", SINGLE),
    "router of another kind": Row(arrays(lambda t: t.update({ROUTER: t[ROUTER].astype("f8")})),
                                  f"tensor {ROUTER!r} has the unsupported dtype float64", SINGLE),
    "dtype of the config": Row(config(dtype="bfloat16"), "config.json says bfloat16, but tensor",
                               SINGLE, (small.expert(0, 0, "down"), "set dtype in config.json")),
    "experts in a dense layer": Row(config(mlp_only_layers=[1]), "layer 1 is dense by the config",
                                    SINGLE, (small.expert(1, 0, "down"),)),
    "another family": Row(config(model_type="mixtral", num_experts=KeyError, num_local_experts=4,
                                 moe_intermediate_size=KeyError, decoder_sparse_step=KeyError,
                                 mlp_only_layers=KeyError, norm_topk_prob=KeyError,
                                 intermediate_size=6),
                          "problems with the weights", "model"),
    "layer absent": Row(arrays(without_layer), "layer 0 has no MoE tensors", "model",
                        ("model.layers.0.mlp.*",)),
}  # fmt: skip
