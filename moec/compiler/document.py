"""The manifest of an artifact as a plain document, from what the compilation made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import host
from ..frontend import Model
from ..schedules.buffers import Buf, PerToken
from ..spec import MoESpec
from .lower import Lowered, Variant, ports

if TYPE_CHECKING:
    from .compile import Shapes, TargetBuild


def weight_file(layer: int) -> str:
    """The name of a layer's weight file in an artifact."""
    return f"weights/layer-{layer:05d}.safetensors"


def document(
    model: Model, shapes: Shapes, builds: Sequence[TargetBuild], weights: str
) -> dict[str, Any]:
    """The manifest without what the writer adds (files, digest, format)."""
    packed = weights == "pack"
    return {
        "producer": {
            "moec": _version("moec"),
            "tvm": _version("apache-tvm"),
            "tvm_ffi": _version("apache-tvm-ffi"),
        },
        "source": model.source,
        "shapes": {name: _shape(spec) for name, spec in shapes.specs.items()},
        "blocks": [
            {
                "layer": block.layer,
                "shape": shapes.of_layer[block.layer],
                "weights": weight_file(block.layer) if packed else None,
                "plan": block.plan.to_json(),
            }
            for block in model.blocks
        ],
        "targets": {build.target.name: _target(build) for build in builds},
        "weights": {"mode": weights, "target": builds[0].target.name if packed else None},
    }


def _version(package: str) -> str:
    if package == "moec":
        from .. import __version__

        return __version__
    return host.installed(package) or ""


def _shape(spec: MoESpec) -> dict[str, Any]:
    parameters = {
        name: {"shape": list(p.shape), "dtype": p.dtype} for name, p in spec.parameters().items()
    }
    return {"spec": spec.to_json(), "parameters": parameters}


def _target(build: TargetBuild) -> dict[str, Any]:
    return {
        "library": build.target.library,
        "device": build.target.kind,
        "requires": build.backend.requires(build.target),
        "shapes": {name: _lowered(lowered) for name, lowered in build.lowered.items()},
    }


def _lowered(lowered: Lowered) -> dict[str, Any]:
    return {
        "packed": {
            name: {
                "shape": list(p.shape),
                "dtype": p.dtype,
                "source": p.source,
                "symbol": p.symbol,
                "per_expert": p.per_expert,
            }
            for name, p in lowered.packed.items()
        },
        "functions": {
            name: _function(lowered.spec, variants) for name, variants in lowered.variants.items()
        },
    }


def _function(spec: MoESpec, variants: Sequence[Variant]) -> dict[str, Any]:
    entry, known = variants[0].entry, ports(spec)
    return {
        "inputs": [_port(known[name], spec) for name in entry.inputs],
        "parameters": list(entry.parameters),
        "outputs": [_port(known[name], spec) for name in entry.outputs],
        "variants": [
            {
                "symbol": v.entry.symbol,
                "schedule": v.schedule.name,
                "tokens": [v.tokens.low, v.tokens.high] if v.tokens else None,
                "workspace": list(v.entry.workspace),
                "deterministic": v.schedule.deterministic,
                "ops": {"kernels": list(v.entry.kernels)},
            }
            for v in variants
        ],
    }


def _port(buf: Buf, spec: MoESpec) -> list[Any]:
    dtype = spec.dtype if buf.name in ("x", "shared_x", "y") else buf.dtype
    return [buf.name, ["T" if isinstance(d, PerToken) else d for d in buf.shape], dtype]
