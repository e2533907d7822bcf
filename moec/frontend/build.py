"""From a family, a config and headers to one Block: its MoESpec and its WeightPlan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import BadSpec, BadWeights
from ..spec import FLOAT_DTYPES, MoESpec
from ..weights import ParamPlan, Piece, WeightPlan
from .family import Family
from .faults import bad_family
from .sources import (
    SLOTS,
    Source,
    always_combinations,
    combinations,
    make_pieces,
    parse_source,
)
from .values import Fields, resolve

# Routers may be kept in another precision than the model; everything else is one dtype.
_OWN_DTYPE = ("router", "shared_router")


@dataclass(frozen=True)
class Block:
    """One MoE block of a model: what it computes and where its weights lie."""

    layer: int
    spec: MoESpec
    plan: WeightPlan
    layout: str


def make_spec(fields: Fields, dtype: str, weight_dtypes: dict[str, str]) -> MoESpec:
    """The MoESpec that the family's templates give; BadSpec tells which fields were read."""
    values = fields.values
    shared = _resolved("shared", fields)
    if not shared.get("intermediate_size"):
        shared = {}  # a width of 0 or null is how configs say that there is none
    activation = _resolved("activation", fields)
    sizes = {"num_experts": values["num_experts"], "top_k": values["top_k"]}
    data: dict[str, Any] = {
        "dtype": dtype,
        "router": {**sizes, **_resolved("router", fields)},
        "experts": {
            **sizes,
            "hidden_size": values["hidden_size"],
            "intermediate_size": values["intermediate_size"],
            "activation": activation,
            **_resolved("experts", fields),
        },
        "shared": {"activation": activation, **shared} if shared else None,
        "norms": _resolved("norms", fields),
        **_resolved("spec", fields),
        "weight_dtypes": sorted(weight_dtypes.items()),
    }
    try:
        return MoESpec.from_json(data)
    except BadSpec as error:
        names = ("num_experts", "top_k", "hidden_size", "intermediate_size")
        groups = tuple(n for n in values if "group" in n)
        raise BadSpec(
            error.message,
            where=f"config.json, as {fields.family.source} reads it",
            need=error.need or "values of one layer that fit together",
            hint=f"the config says {fields.describe((*names, *groups))}",
        ) from None


def _resolved(name: str, fields: Fields) -> dict[str, Any]:
    """A table of templates with its values; null counts as an empty table."""
    value = resolve(getattr(fields.family, name), fields)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_family(f"{name} gives {value!r}", fields.family.source, "a table")
    return value


def make_block(
    checkpoint: Checkpoint, fields: Fields, prefix: str, layer: int, dtype: str
) -> Block:
    """The block of `layer`; what is missing on disk is left to `plan.problems`."""
    family, fields = fields.family, fields.at(layer)
    base = prefix + family.layer.replace("{L}", str(layer))
    spec = make_spec(fields, dtype, {})
    dims = _dims(spec)
    layout = choose_layout(checkpoint, family, base, dims)
    sources = _sources(checkpoint, family, base, layout)
    dtypes = {}
    for name in _OWN_DTYPE:
        slots = (slots[0] for slots in combinations(name))
        slot = next((s for s in slots if s in sources and name in spec.parameters()), None)
        stored = checkpoint.tensors.get(base + sources[slot].name) if slot else None
        # An unsupported dtype is left to `plan.problems`, which names the tensor.
        if stored is not None and stored.dtype != dtype and stored.dtype in FLOAT_DTYPES:
            dtypes[name] = stored.dtype
    spec = make_spec(fields, dtype, dtypes)
    params = []
    for name, parameter in spec.parameters().items():
        per_expert = SLOTS[combinations(name)[0][0]].per_expert
        if per_expert and spec.router.always:
            count, every = dims["E"], spec.experts.num_experts
            pieces = (
                *_pieces(name, combinations(name), sources, base, dims, family, (0, count)),
                *_pieces(
                    name, always_combinations(name), sources, base, dims, family, (count, every)
                ),
            )
        else:
            pieces = _pieces(name, combinations(name), sources, base, dims, family)
        params.append((name, ParamPlan(parameter.shape, parameter.dtype, per_expert, pieces)))
    zero = range(dims["E"], dims["E"] + spec.experts.zero_experts)
    spare = tuple(base + name.replace("{z}", str(e)) for name in family.spare for e in zero)
    plan = WeightPlan(tuple(params), tuple(base + owned for owned in family.owns), spare)
    return Block(layer, spec, plan, layout)


def _dims(spec: MoESpec) -> dict[str, int]:
    e, r = spec.experts, spec.router
    return {
        "E": e.num_experts - r.always,
        "H": e.hidden_size,
        "I": e.intermediate_size,
        "F": spec.shared.intermediate_size if spec.shared else 0,
        "M": e.latent_size or 0,
        "N": r.always,
        "R": r.num_experts,
        "S": r.selectable,
        "W": e.width,
        "V": r.vocab_size,
        "K": r.top_k,
        "1": 1,
    }


def _table(family: Family, layout: str) -> dict[str, Any]:
    # A layout that says how gate and up are stored replaces every other way of saying it.
    return {**family.tensors, **family.layouts[layout]}


def _sources(checkpoint: Checkpoint, family: Family, base: str, layout: str) -> dict[str, Source]:
    out: dict[str, Source] = {}
    for slot, value in _table(family, layout).items():
        texts = value if isinstance(value, list) else [value]
        choices = [parse_source(t.replace("{x}", family.block), family.source) for t in texts]
        found = (c for c in choices if base + c.name.replace("{e}", "0") in checkpoint.tensors)
        out[slot] = next(found, choices[0])
    return out


def choose_layout(checkpoint: Checkpoint, family: Family, base: str, dims: dict[str, int]) -> str:
    """The layout of which most expert tensors are there, with the shapes that it states.

    Ties go to the layout that the family lists first.
    """
    best, best_score = next(iter(family.layouts)), (0.0, 0.0)
    for layout in family.layouts:
        names = present = fitting = 0
        for slot, source in _sources(checkpoint, family, base, layout).items():
            if SLOTS[slot].param not in ("gate_up", "down"):
                continue
            shape = source.shape(SLOTS[slot].dims(dims))
            for e in range(dims["E"] if "{e}" in source.name else 1):
                info = checkpoint.tensors.get(base + source.name.replace("{e}", str(e)))
                names += 1
                present += info is not None
                fitting += info is not None and info.shape == shape
        score = (present / names, fitting / names) if names else (0.0, 0.0)
        if score > best_score:
            best, best_score = layout, score
    return best


def _pieces(
    param: str,
    choices: tuple[tuple[str, ...], ...],
    sources: dict[str, Source],
    base: str,
    dims: dict[str, int],
    family: Family,
    experts: tuple[int, int] | None = None,
) -> tuple[Piece, ...]:
    for slots in choices:
        if all(slot in sources for slot in slots):
            pieces: list[Piece] = []
            for slot in slots:
                row = pieces[-1].rows[1] if pieces else 0
                source = sources[slot]
                name = base + source.name
                pieces += make_pieces(SLOTS[slot], source, name, row, dims, family.source, experts)
            return tuple(pieces)
    raise bad_family(
        f"the family names no tensor for {param}",
        family.source,
        " or ".join(" and ".join(slots) for slots in choices),
    )


def holds_experts(checkpoint: Checkpoint, family: Family, base: str) -> str | None:
    """The name of an expert tensor that exists below `base`, whatever the config says."""
    for layout in family.layouts:
        sources = _sources(checkpoint, family, base, layout)
        down = sources.get("down")
        name = base + down.name.replace("{e}", "0") if down else ""
        # `{x}down_proj` without the experts level is also the name of a dense layer's matrix.
        if (
            down
            and name in checkpoint.tensors
            and len(checkpoint.tensors[name].shape) == len(down.axes)
        ):
            return name
    return None


def unfit(
    message: str,
    checkpoint: Checkpoint,
    need: str,
    hint: str = "use the config.json that was made with these weights",
    *,
    tensor: str | None = None,
) -> BadWeights:
    """A BadWeights about the file of `tensor`, or about the whole checkpoint."""
    file = checkpoint.tensors[tensor].file if tensor else ""
    return BadWeights(message, where=str(checkpoint.path / file), need=need, hint=hint)
