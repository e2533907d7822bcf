"""A tiny artifact written by hand: real native code with simple, checkable mathematics.

E = 4 experts, K = 2, H = 8, I = 3. With g = gate_up[id, 0, h] and d = down[id, h, 0]:

    experts: y[t, h] = sum over k with 0 <= id < E of w[t, k] * (x[t, h] * g + d)
    route:   ids[t, k] = (t + k) % E, weights[t, k] = x[t, k] + k
    moe:     y[t, h] = 2 * x[t, h]

Schedule "loop" of experts adds 1000, so that a test sees which variant ran. For bfloat16,
x and y carry raw bits, and all functions copy x to y (experts where the first id is valid).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from moec.artifact import ArtifactWriter
from moec.artifact.manifest import encode
from moec.host import host, installed
from moec.spec import ExpertsSpec, MoESpec, RouterSpec

E, K, H, I = 4, 2, 8, 3

_HEAD = """
@T.prim_func(s_tir=True)
def {name}({args}, ws_h: T.handle, nt: T.int32):
    T.func_attr({{"global_symbol": "{name}"}})
    n = T.int32()
    m = T.int32()
    X = T.match_buffer(x_h, (n, 8), "{dtype}", align={size})
{buffers}
    WS = T.match_buffer(ws_h, (m,), "uint8")
    for c in T.parallel(nt):
        for t in range(c * n // nt, (c + 1) * n // nt):
{body}
"""

_PACK = """
@T.prim_func(s_tir=True)
def b0_pack_gate_up(S: T.Buffer((6, 8), "{raw}"), D: T.Buffer((8, 6), "{raw}"), nt: T.int32):
    T.func_attr({{"global_symbol": "b0_pack_gate_up"}})
    for i in range(6):
        for j in range(8):
            D[j, i] = S[i, j]
"""

_IDS = 'IDS = T.match_buffer({}, (n, 2), "int32", align=4)'
_WEIGHTS = 'W = T.match_buffer({}, (n, 2), "float32", align=4)'
_PARAMETERS = 'G: T.Buffer((4, 8, 6), "{raw}"), D: T.Buffer((4, 8, 3), "{raw}")'


def _function(name: str, dtype: str, args: str, buffers: list[str], body: list[str]) -> str:
    raw = "uint16" if dtype == "bfloat16" else dtype
    size = 2 if raw == "uint16" else 4
    return _HEAD.format(
        name=name,
        args=args.format(raw=raw),
        dtype=dtype,
        size=size,
        buffers="\n".join(f"    {line.format(dtype=dtype, size=size)}" for line in buffers),
        body="\n".join(" " * 12 + line for line in body),
    )


def _experts(name: str, dtype: str, extra: str) -> str:
    y = 'Y = T.match_buffer(y_h, (n, 8), "{dtype}", align={size})'
    if dtype == "bfloat16":
        body = [
            "for h in range(8):",
            "    if IDS[t, 0] >= 0 and IDS[t, 0] < 4:",
            "        Y[t, h] = X[t, h]",
            "    else:",
            "        Y[t, h] = T.bfloat16(0)",
        ]
    else:
        body = [
            "for h in range(8):",
            f"    Y[t, h] = T.float32({extra})",
            "    for k in range(2):",
            "        if IDS[t, k] >= 0 and IDS[t, k] < 4:",
            "            Y[t, h] = Y[t, h] + W[t, k] * "
            "(X[t, h] * G[IDS[t, k], h, 0] + D[IDS[t, k], h, 0])",
        ]
    return _function(
        name,
        dtype,
        f"x_h: T.handle, i_h: T.handle, w_h: T.handle, {_PARAMETERS}, y_h: T.handle",
        [_IDS.format("i_h"), _WEIGHTS.format("w_h"), y],
        body,
    )


def sources(dtype: str) -> dict[str, str]:
    """TVMScript of every symbol of the fake library, by name."""
    raw = "uint16" if dtype == "bfloat16" else dtype
    copy = "Y[t, h] = X[t, h]" if dtype == "bfloat16" else "Y[t, h] = X[t, h] * T.float32(2)"
    weight = "T.float32(1)" if dtype == "bfloat16" else "X[t, k] + T.cast(k, 'float32')"
    return {
        "b0_experts": _experts("b0_experts", dtype, "0"),
        "b0_experts_loop": _experts("b0_experts_loop", dtype, "1000"),
        "b0_moe": _function(
            "b0_moe",
            dtype,
            "x_h: T.handle, y_h: T.handle",
            ['Y = T.match_buffer(y_h, (n, 8), "{dtype}", align={size})'],
            ["for h in range(8):", f"    {copy}"],
        ),
        "b0_route": _function(
            "b0_route",
            dtype,
            "x_h: T.handle, i_h: T.handle, w_h: T.handle",
            [_IDS.format("i_h"), _WEIGHTS.format("w_h")],
            ["for k in range(2):", "    IDS[t, k] = (t + k) % 4", f"    W[t, k] = {weight}"],
        ),
        "b0_pack_gate_up": _PACK.format(raw=raw),
    }


def library(dtype: str, path: Path) -> Path:
    """Compile the fake library to `path`."""
    import tvm
    from tvm.script import from_source
    from tvm.script import tirx as T

    from moec import target as targets
    from moec.schedules.cpu import launcher
    from moec.schedules.linking import link

    module = tvm.IRModule(
        {name: from_source(text, extra_vars={"T": T}) for name, text in sources(dtype).items()}
    )
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v2"} if _x86() else "llvm")
    built = tvm.tirx.build(module, target=target)
    link(built, targets.resolve("cpu"), path, [launcher.SOURCE])
    return path


# Removed when the process ends; session-wide, because compiling takes seconds.
_folder = tempfile.TemporaryDirectory(prefix="moec-fake-")


def shared_library(dtype: str = "float32") -> Path:
    """The fake library for `dtype`, compiled once per process."""
    path = Path(_folder.name) / f"{dtype}.so"
    return path if path.exists() else library(dtype, path)


def shared(dtype: str = "float32") -> Path:
    """An artifact with layers 1 and 3, written once per process: do not change it."""
    path = Path(_folder.name) / f"{dtype}.moec"
    if not path.exists():
        write(path, shared_library(dtype), dtype)
    return path


def copied(folder: Path, dtype: str = "float32") -> Path:
    """A copy of the shared artifact below `folder`, to be damaged."""
    return Path(shutil.copytree(shared(dtype), folder / "copy.moec"))


def edit(path: Path, **changes: Any) -> None:
    """Change top-level keys of a manifest (a callable gets the old value), with a right digest."""
    document = json.loads((path / "manifest.json").read_bytes())
    for key, change in changes.items():
        document[key] = change(document[key]) if callable(change) else change
    (path / "manifest.json").write_bytes(encode(document)[0])


def _x86() -> bool:
    return host().arch == "x86_64"


def spec(dtype: str) -> MoESpec:
    """The block that the fake artifact claims to compute."""
    return MoESpec(dtype, RouterSpec(E, K), ExpertsSpec(E, K, H, I))


def weights(dtype: str) -> dict[str, np.ndarray]:
    """Canonical gate_up [E, 2I, H] and down [E, H, I], raw bits for bfloat16."""
    random = np.random.default_rng(0)
    shapes = {"gate_up": (E, 2 * I, H), "down": (E, H, I)}
    arrays = {name: random.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    if dtype != "bfloat16":
        return arrays
    return {name: (a.view("u4") >> 16).astype("u2") for name, a in arrays.items()}


def experts(x: np.ndarray, ids: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What the compiled float32 `experts` computes."""
    arrays = weights("float32")
    y = np.zeros_like(x)
    for k in range(K):
        ok = (ids[:, k] >= 0) & (ids[:, k] < E)
        e = np.where(ok, ids[:, k], 0)
        term = w[:, k, None] * (x * arrays["gate_up"][e, 0] + arrays["down"][e, :, 0])
        y += np.where(ok[:, None], term, 0)
    return y


def document(dtype: str, **changes: Any) -> dict[str, Any]:
    """The manifest of the fake artifact, as the compiler would hand it to the writer."""
    raw = "uint16" if dtype == "bfloat16" else dtype
    block = spec(dtype)
    x, y = [["x", ["T", H], dtype]], [["y", ["T", H], dtype]]
    routed = [["topk_ids", ["T", K], "int32"], ["topk_weights", ["T", K], "float32"]]
    names = ["gate_up", "down"]

    def variant(symbol: str, schedule: str, tokens: list[int | None] | None) -> dict[str, Any]:
        return {
            "symbol": symbol,
            "schedule": schedule,
            "tokens": tokens,
            "workspace": [256, 16],
            "deterministic": True,
            "ops": {},
        }

    functions = {
        "route": (x, [], routed, [variant("b0_route", "fused", [0, None])]),
        "experts": (
            x + routed,
            names,
            y,
            [variant("b0_experts", "fused", [0, 100000]), variant("b0_experts_loop", "loop", None)],
        ),
        "moe": (x, [], y, [variant("b0_moe", "fused", [0, None])]),
    }
    packed = {
        "gate_up": ([E, H, 2 * I], "b0_pack_gate_up", True),
        "down": ([E, H, I], None, False),
    }
    made: dict[str, Any] = {
        "producer": {
            "moec": "0",
            "tvm": installed("apache-tvm"),
            "tvm_ffi": installed("apache-tvm-ffi"),
        },
        "source": {"family": "fake", "config_sha256": "0" * 64, "tensors_sha256": "0" * 64},
        "shapes": {
            "b0": {
                "spec": block.to_json(),
                "parameters": {
                    name: {"shape": list(p.shape), "dtype": p.dtype}
                    for name, p in block.parameters().items()
                },
            }
        },
        "blocks": [
            {
                "layer": layer,
                "shape": "b0",
                "weights": f"weights/layer-{layer:05d}.safetensors",
                "plan": None,
            }
            for layer in (1, 3)
        ],
        "targets": {
            "cpu-fake": {
                "library": "lib/cpu-fake.so",
                "device": "cpu",
                "requires": {"os": host().os, "arch": host().arch, "features": []},
                "shapes": {
                    "b0": {
                        "packed": {
                            name: {
                                "shape": shape,
                                "dtype": raw,
                                "source": name,
                                "symbol": symbol,
                                "per_expert": per_expert,
                            }
                            for name, (shape, symbol, per_expert) in packed.items()
                        },
                        "functions": {
                            name: {
                                "inputs": inputs,
                                "parameters": parameters,
                                "outputs": outputs,
                                "variants": variants,
                            }
                            for name, (inputs, parameters, outputs, variants) in functions.items()
                        },
                    }
                },
            }
        },
        "weights": {"mode": "pack", "target": "cpu-fake"},
    }
    return {**made, **changes}


def write(path: Path, lib: Path, dtype: str = "float32", *, force: bool = False) -> str:
    """Write the fake artifact with packed weights; returns its digest."""
    raw = "uint16" if dtype == "bfloat16" else dtype
    arrays = weights(dtype)
    with ArtifactWriter(path, force=force) as writer:
        writer.add_file("lib/cpu-fake.so", lib)
        writer.add_bytes("ir/b0.py", b"# for people\n")
        for layer in (1, 3):
            layout = [("gate_up", raw, (E, H, 2 * I)), ("down", raw, (E, H, I))]
            with writer.tensors(f"weights/layer-{layer:05d}.safetensors", layout) as out:
                for e in range(E):
                    out.write("gate_up", np.ascontiguousarray(arrays["gate_up"][e].T))
                out.write("down", arrays["down"])
        return writer.finish(document(dtype))
