"""Which family a config belongs to, and the errors that say why none fits."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

from ..checkpoint import Checkpoint
from ..errors import BadSpec
from .family import Family, common
from .faults import bad_config, shown
from .values import Config, find

_NESTED = "text_config"


def find_family(checkpoint: Checkpoint, families: Iterable[Family]) -> tuple[Family, Config]:
    """The family of `checkpoint` and the (nested) config that holds its fields.

    Raises BadSpec for a model type that is unknown, refused, or quantized.
    """
    families = tuple(families)
    config = checkpoint.config
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise bad_config("model_type is missing", "the name of a model family")
    for path, inner in _candidates(config):
        for family in families:
            if inner.get("model_type") in family.model_types or (
                path and family.wrappers.get(model_type) == path
            ):
                _refuse_quantized(config, inner)
                _refuse_unknown_fields(family, inner)
                return family, inner
    for _, inner in _candidates(config):
        reason = common().refused.get(str(inner.get("model_type")))
        if reason is not None:
            raise bad_config(
                f"the model type {inner['model_type']!r} is not supported: {reason}",
                "layers whose result for a token depends on that token alone",
                "use another model",
            )
    raise _unknown(checkpoint, model_type, families)


def _candidates(config: Config) -> Iterator[tuple[str, Config]]:
    """The config and what is nested in it, two levels deep: (path, config)."""
    yield "", config
    nested = [(k, v) for k, v in config.items() if isinstance(v, dict) and k.endswith("_config")]
    yield from nested
    for outer, value in nested:
        for name, inner in value.items():
            if isinstance(inner, dict) and name.endswith("_config"):
                yield f"{outer}.{name}", inner


def _refuse_quantized(*configs: Config) -> None:
    for config in configs:
        for key in ("quantization_config", "compression_config"):
            value = config.get(key)
            if value is not None:
                method = value.get("quant_method") if isinstance(value, dict) else value
                raise bad_config(
                    f"{key}: {shown(method)} weights are not supported yet",
                    "float32, bfloat16 or float16 weights",
                    "use a checkpoint of the same model that is not quantized",
                )


def looks_like_moe(key: str) -> bool:
    """Whether a config key sounds as if it changed what an MoE layer computes."""
    return any(re.search(pattern, key) for pattern in common().looks_like_moe)


def _refuse_unknown_fields(family: Family, config: Config) -> None:
    known = {key for field in family.config.values() for key in field.keys}
    known |= {*family.ignore, *common().ignore}
    entries = dict(config)
    for table in sorted({key.rpartition(".")[0] for key in known if "." in key}):
        inner = find(config, table)[1]
        if isinstance(inner, dict):
            entries.update({f"{table}.{k}": v for k, v in inner.items()})
    # A null says that the feature is off in every config format that writes nulls.
    unknown = sorted(
        k
        for k, v in entries.items()
        if looks_like_moe(k) and k not in known and v is not None and not isinstance(v, dict)
    )
    if unknown:
        raise bad_config(
            f"{_names(unknown)}: not understood for the family {family.family}",
            f"fields that {family.source} reads or ignores",
            "if they do not change what the layer computes, copy that file, add them to"
            " `ignore`, and pass it with --family FILE",
        )


def _unknown(checkpoint: Checkpoint, model_type: str, families: tuple[Family, ...]) -> BadSpec:
    config = checkpoint.config
    inner = config.get(_NESTED)
    fields = {**config, **(inner if isinstance(inner, dict) else {})}
    odd = sorted(k for k in fields if looks_like_moe(k) and k not in common().ignore)
    if len(families) == 1:  # --family FILE
        return bad_config(
            f"{families[0].source} does not describe the model type {shown(model_type)}",
            ", ".join(families[0].model_types),
            "add it to `model_types` of that file if the layers are the same",
        )
    near = nearest(model_type, set(fields), families)
    if not odd:
        return bad_config(
            f"the model type {shown(model_type)} is not known, and no field of the config is about"
            " experts",
            "a Mixture-of-Experts model",
            f"known families: {', '.join(f.family for f in families)}",
        )
    values = ", ".join(f"{_names([k])} = {shown(fields[k])}" for k in odd[:12])
    experts = sorted({re.sub(r"\d+", "N", n) for n in checkpoint.tensors if "expert" in n})
    tensors = f"; tensors: {', '.join(experts[:6])}" if experts else ""
    return bad_config(
        f"the model type {shown(model_type)} is not known",
        f"one of the known families; the nearest is {near.family}",
        f"describe it in a family file like {near.source} and pass --family FILE;"
        f" not understood: {values}{tensors}",
    )


def _names(keys: list[str]) -> str:
    """Keys of an untrusted file for a message, escaped where a terminal would obey them."""
    return ", ".join(k if k.isprintable() and len(k) <= 60 else shown(k) for k in keys[:12])


def nearest(model_type: str, keys: set[str], families: Iterable[Family]) -> Family:
    """The family whose MoE fields and name are most like the given ones."""

    def likeness(family: Family) -> float:
        own = {k for f in family.config.values() for k in f.keys if looks_like_moe(k)}
        shared = len(own & keys) / max(len(own), 1)
        names = (difflib.SequenceMatcher(None, model_type, m).ratio() for m in family.model_types)
        return shared + max(names)

    return max(families, key=likeness)
