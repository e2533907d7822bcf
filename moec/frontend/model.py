"""read_model: a model directory in, one Block for every MoE layer out; headers only."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import BadSpec
from ..spec import FLOAT_DTYPES
from ..weights import Problem, weights_error
from .build import Block, holds_experts, make_block, unfit
from .family import Family, builtin, load
from .layers import moe_layers
from .lookup import find_family
from .values import Config, Fields, read_fields


@dataclass(frozen=True)
class Model:
    """The MoE layers of one checkpoint, and the facts about them that people ask for."""

    path: pathlib.Path
    family: str
    model_type: str
    dtype: str
    prefix: str
    num_layers: int
    dense_layers: tuple[int, ...]
    blocks: tuple[Block, ...]
    source: dict[str, str] = field(default_factory=dict)


def read_model(path: str | pathlib.Path, family_file: str | pathlib.Path | None = None) -> Model:
    """Read and check the model directory `path`, from its config and headers alone.

    `family_file` is a family in TOML or JSON to use in place of the built-in ones. Raises
    BadCheckpoint, BadSpec, or BadWeights with the first five of all problems.
    """
    with Checkpoint.open(path) as checkpoint:
        model = outline(checkpoint, family_file)
        check(model, checkpoint)
        return model


def check(model: Model, checkpoint: Checkpoint) -> None:
    """Raise BadWeights, with the first five problems, unless every block's weights fit."""
    problems = find_problems(model, checkpoint)
    if problems:
        raise weights_error(problems, checkpoint)


def outline(checkpoint: Checkpoint, family_file: str | pathlib.Path | None = None) -> Model:
    """The model as its config describes it; the weights are matched but not yet checked."""
    families = builtin() if family_file is None else (load(family_file),)
    family, config = find_family(checkpoint, families)
    fields = read_fields(family, config)
    layers = moe_layers(fields)
    prefix = _prefix(checkpoint, family, layers[0])
    dtype = _dtype(checkpoint, config, family, prefix, layers[0])
    count = fields.values["num_layers"]
    return Model(
        path=checkpoint.path,
        family=family.family,
        model_type=str(checkpoint.config["model_type"]),
        dtype=dtype,
        prefix=prefix,
        num_layers=count,
        dense_layers=_dense(checkpoint, fields, prefix, set(range(count)) - set(layers)),
        blocks=tuple(make_block(checkpoint, fields, prefix, layer, dtype) for layer in layers),
        source={"family": family.family, **checkpoint.digest()},
    )


def find_problems(model: Model, checkpoint: Checkpoint) -> list[Problem]:
    """Everything that is wrong with the weights of any block."""
    return [p for block in model.blocks for p in block.plan.problems(checkpoint)]


def _prefix(checkpoint: Checkpoint, family: Family, layer: int) -> str:
    below = family.layer.replace("{L}", str(layer))
    counts = {
        prefix: sum(len(checkpoint.names_under(prefix + below + own)) for own in family.owns)
        for prefix in family.prefixes
    }
    best = max(counts, key=lambda prefix: counts[prefix])
    if counts[best]:
        return best
    tried = ", ".join(f"{prefix}{below}{family.owns[0]}*" for prefix in family.prefixes)
    found = sorted(n for n in checkpoint.tensors if f"layers.{layer}." in n)[:5]
    raise unfit(
        f"layer {layer} has no MoE tensors under any name of the family {family.family}",
        checkpoint,
        tried,
        f"the layer holds {', '.join(found)}" if found else "the weights of the layer are absent",
    )


def _dtype(
    checkpoint: Checkpoint, config: Config, family: Family, prefix: str, layer: int
) -> str:
    base = prefix + family.layer.replace("{L}", str(layer))
    name = holds_experts(checkpoint, family, base)
    stored = checkpoint.tensors[name].dtype if name else None
    declared: Any = None
    for place in (config, checkpoint.config):
        for key in ("dtype", "torch_dtype"):
            declared = declared or place.get(key)
    if declared is None:
        declared = stored or "float32"
    dtype = str(declared).removeprefix("torch.")
    if dtype not in FLOAT_DTYPES:
        raise BadSpec(f"dtype: {dtype!r} is not supported", where="config.json",
                      need=" or ".join(FLOAT_DTYPES))  # fmt: skip
    if stored is not None and stored != dtype:
        raise unfit(
            f"config.json says {dtype}, but {name} is {stored}",
            checkpoint,
            f"expert weights in {dtype}",
            "set dtype in config.json to what the files hold, or convert the files",
        )
    return dtype


def _dense(
    checkpoint: Checkpoint, fields: Fields, prefix: str, layers: set[int]
) -> tuple[int, ...]:
    family = fields.family
    for layer in sorted(layers):
        base = prefix + family.layer.replace("{L}", str(layer))
        name = holds_experts(checkpoint, family, base)
        if name:
            raise unfit(
                f"layer {layer} is dense by the config, but there is {name}",
                checkpoint,
                "a config and weights of the same model",
            )
    return tuple(sorted(layers))
