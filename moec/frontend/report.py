"""What a checkpoint's MoE layers are, for people (`text`) and for machines (`describe`).

Both take a `Model`, so they cost no more than reading the headers. Bytes and counts are those
of the canonical parameters: what moec reads of the checkpoint, not the size of its files.
"""

from __future__ import annotations

import math
import textwrap
from typing import Any

from ..spec import MoESpec, SharedGate
from ..text import amount, ranges, size
from ..weights import ParamPlan, Piece
from . import formula
from .build import Block
from .model import Model

WIDTH = 96
_LABEL = 12
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def shapes(model: Model) -> dict[str, list[Block]]:
    """The blocks by distinct spec, named b0, b1, ... in the order of the layers."""
    groups: dict[MoESpec, list[Block]] = {}
    for block in model.blocks:
        groups.setdefault(block.spec, []).append(block)
    return {f"b{i}": blocks for i, blocks in enumerate(groups.values())}


def describe(model: Model) -> dict[str, Any]:
    """Facts about the model as plain data: layers, sizes, and one entry for every shape."""
    table = {name: _shape(blocks) for name, blocks in shapes(model).items()}
    every = [(entry, len(entry["layers"])) for entry in table.values()]
    return {
        "kind": "checkpoint",
        "path": str(model.path),
        "family": model.family,
        "model_type": model.model_type,
        "dtype": model.dtype,
        "prefix": model.prefix,
        "source": dict(model.source),
        "layers": {
            "count": model.num_layers,
            "moe": [block.layer for block in model.blocks],
            "dense": list(model.dense_layers),
        },
        "shapes": table,
        "bytes": sum(entry["bytes"] * n for entry, n in every),
        "elements": sum(entry["elements"] * n for entry, n in every),
        "active_elements": sum(entry["active_elements"] * n for entry, n in every),
        "problems": [str(problem) for problem in model.problems],
    }


def _shape(blocks: list[Block]) -> dict[str, Any]:
    spec, plan = blocks[0].spec, dict(blocks[0].plan.params)
    layouts: dict[str, list[int]] = {}
    for block in blocks:
        layouts.setdefault(block.layout, []).append(block.layer)
    parameters = {
        name: {
            "shape": list(p.shape),
            "dtype": p.dtype,
            "bytes": math.prod(p.shape) * _BYTES[p.dtype],
            "sources": [_source(piece, blocks[0].layer) for piece in _distinct(p)],
        }
        for name, p in plan.items()
    }
    return {
        "layers": [block.layer for block in blocks],
        "layouts": layouts,
        "router": formula.router(spec.router),
        "activation": formula.activation(spec.experts.activation, spec.experts.gated),
        "parameters": parameters,
        "bytes": sum(p["bytes"] for p in parameters.values()),
        "elements": sum(math.prod(p.shape) for p in plan.values()),
        "active_elements": sum(_active(p, spec.experts.top_k) for p in plan.values()),
        "spec": spec.to_json(),
    }


def _active(plan: ParamPlan, top_k: int) -> int:
    """Elements that one token uses: K experts of what is kept by expert, all of the rest."""
    return math.prod(plan.canonical) * (top_k if plan.per_expert else 1)


def _distinct(plan: ParamPlan) -> list[Piece]:
    return list({piece.tensor: piece for piece in plan.pieces}.values())


def _source(piece: Piece, layer: int) -> dict[str, Any]:
    return {
        "tensor": piece.tensor.replace(f".{layer}.", ".{L}.", 1),
        "shape": list(piece.shape),
        "transposed": piece.transpose,
        "interleaved": any(len(a) == 3 and a[2] == 2 for a in piece.index),
    }


def text(model: Model) -> str:
    """The same for a terminal of 100 columns; all problems at the end."""
    facts = describe(model)
    moe, dense = facts["layers"]["moe"], facts["layers"]["dense"]
    layers = f"{model.num_layers}: {len(moe)} MoE ({ranges(moe)}), {len(dense)} dense"
    lines = [
        "checkpoint".ljust(_LABEL) + str(model.path),
        *_row("model", f"{model.model_type} (family {model.family}), {model.dtype}"),
        *_row("layers", layers + (f" ({ranges(dense)})" if dense else "")),
        *_row(
            "MoE weights",
            f"{size(facts['bytes'])}, {amount(facts['elements'])} parameters, "
            f"{amount(facts['active_elements'])} active per token",
        ),
        *_row("compiles to", _plural(len(facts["shapes"]), "block shape")),
    ]
    for name, blocks in shapes(model).items():
        lines += ["", *_block(name, blocks, facts["shapes"][name], model.prefix)]
    if model.problems:
        lines += ["", f"{_plural(len(model.problems), 'problem')} with the weights:"]
        lines += [f"  - {problem}" for problem in model.problems]
    return "\n".join(lines)


def _block(name: str, blocks: list[Block], facts: dict[str, Any], prefix: str) -> list[str]:
    spec, plan = blocks[0].spec, dict(blocks[0].plan.params)
    experts = spec.experts
    lines = [
        *_row(name, f"layers {ranges(facts['layers'])}"),
        *_row("router", facts["router"]),
        *_row("experts", f"{facts['activation']}{_biases(spec)}"),
        *_row(
            "sizes",
            f"E={experts.num_experts} K={experts.top_k} H={experts.hidden_size} "
            f"I={experts.intermediate_size}, {size(facts['bytes'])} a layer",
        ),
    ]
    if spec.shared is not None:
        gate = ", times sigmoid(x @ gate)" if spec.shared.gate is SharedGate.SIGMOID else ""
        act = formula.activation(spec.shared.activation)
        lines += _row("shared", f"F={spec.shared.intermediate_size}, {act}{gate}")
    norms = [n.removeprefix("norm_") for n in plan if n.startswith("norm_")]
    if norms:
        lines += _row("norms", ", ".join(norms) + ("; adds x" if spec.norms.residual else ""))
    for layout, layers in facts["layouts"].items():
        only = f" (layers {ranges(layers)})" if len(facts["layouts"]) > 1 else ""
        block = next(b for b in blocks if b.layer == layers[0])
        first, *more = _tensors(block, prefix)
        lines += [*_row("on disk", f"{layout}{only}: {first}"), *(" " * _LABEL + m for m in more)]
    return lines + _parameters(plan)


def _biases(spec: MoESpec) -> str:
    present = (("gate_up", spec.experts.gate_up_bias), ("down", spec.experts.down_bias))
    named = [name for name, there in present if there]
    return f", bias on {' and '.join(named)}" if named else ""


def _tensors(block: Block, prefix: str) -> list[str]:
    out = []
    for name in ("gate_up", "down"):
        for piece in _distinct(block.plan[name]):
            source = _source(piece, block.layer)
            words = f"{source['tensor'].removeprefix(prefix)} {source['shape']}"
            out.append(words + (" interleaved" if source["interleaved"] else ""))
    return out


def _parameters(plan: dict[str, ParamPlan]) -> list[str]:
    rows = [
        (name, str(list(p.shape)), p.dtype, size(math.prod(p.shape) * _BYTES[p.dtype]))
        for name, p in plan.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for *words, number in rows:
        cells = [word.ljust(width) for word, width in zip(words, widths, strict=False)]
        lines.append(" " * _LABEL + "  ".join([*cells, number.rjust(widths[3])]))
    return lines


def _row(label: str, value: str) -> list[str]:
    # Names are never broken: one is better whole than in a tidy column.
    return textwrap.wrap(
        value,
        WIDTH,
        initial_indent=label.ljust(_LABEL),
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [label]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
