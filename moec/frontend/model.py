"""read_model: a model directory in, one Block for every MoE layer out; headers only."""

from __future__ import annotations

import itertools
import os
import pathlib
from dataclasses import dataclass, field, replace

from ..checkpoint import Checkpoint
from ..spec import FLOAT_DTYPES
from ..weights import Problem, weights_error
from .build import Block, holds_experts, make_block, unfit
from .family import Family, builtin, load
from .faults import bad_config, shown
from .layers import moe_layers
from .lookup import find_family
from .values import Config, Fields, read_fields

# Whoever has more has the wrong config; a hostile one could claim millions of experts.
MAX_PROBLEMS = 10_000
_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Model:
    """The MoE layers of one checkpoint, and the facts about them that people ask for.

    `problems` is what is wrong with the weights; it is only filled by `survey`.
    """

    path: pathlib.Path
    family: str
    model_type: str
    dtype: str
    prefix: str
    num_layers: int
    dense_layers: tuple[int, ...]
    blocks: tuple[Block, ...]
    source: dict[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


def read_model(
    path: str | os.PathLike[str], family_file: str | os.PathLike[str] | None = None
) -> Model:
    """Read and check the model directory `path`, from its config and headers alone.

    `family_file` is a family in TOML or JSON to use in place of the built-in ones. Raises
    BadCheckpoint, BadSpec, or BadWeights with the first five of all problems.
    """
    with Checkpoint.open(path) as checkpoint:
        model = outline(checkpoint, family_file)
        check(model, checkpoint)
        return model


def survey(
    path: str | os.PathLike[str], family_file: str | os.PathLike[str] | None = None
) -> Model:
    """As `read_model`, but problems of the weights are kept in `Model.problems`, not raised."""
    with Checkpoint.open(path) as checkpoint:
        model = outline(checkpoint, family_file)
        return replace(model, problems=tuple(find_problems(model, checkpoint)))


def check(model: Model, checkpoint: Checkpoint) -> None:
    """Raise BadWeights, with the first five problems, unless every block's weights fit."""
    problems = find_problems(model, checkpoint)
    if problems:
        raise weights_error(problems, checkpoint)


def outline(checkpoint: Checkpoint, family_file: str | os.PathLike[str] | None = None) -> Model:
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
    """What is wrong with the weights of any block: everything, within reason."""
    every = (p for block in model.blocks for p in block.plan.problems(checkpoint))
    found = list(itertools.islice(every, MAX_PROBLEMS + 1))
    if len(found) > MAX_PROBLEMS:
        found[-1] = Problem(f"there are more than {MAX_PROBLEMS} problems")
    return found


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


def _dtype(checkpoint: Checkpoint, config: Config, family: Family, prefix: str, layer: int) -> str:
    base = prefix + family.layer.replace("{L}", str(layer))
    name = holds_experts(checkpoint, family, base)
    stored = checkpoint.tensors[name].dtype if name else None
    places = ((place, key) for place in (config, checkpoint.config) for key in _DTYPE_KEYS)
    found = (place[key] for place, key in places if place.get(key) is not None)
    declared = next(found, None)
    dtype = str(stored or "float32" if declared is None else declared).removeprefix("torch.")
    if declared is not None and dtype not in FLOAT_DTYPES:
        raise bad_config(
            f"dtype: {shown(declared)} is not supported",
            " or ".join(FLOAT_DTYPES),
            "convert the checkpoint, or use one in another dtype",
        )
    if stored is not None and (stored != dtype or stored not in FLOAT_DTYPES):
        said = f"config.json says {dtype}, but " if declared is not None else ""
        raise unfit(
            f"{said}tensor {name!r} is {stored}",
            checkpoint,
            f"expert weights in {dtype if declared is not None else ' or '.join(FLOAT_DTYPES)}",
            "set dtype in config.json to what the files hold, or convert the files",
            tensor=name,
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
                f"layer {layer} is dense by the config, but there is tensor {name!r}",
                checkpoint,
                "a config and weights of the same model",
                tensor=name,
            )
    return tuple(sorted(layers))
