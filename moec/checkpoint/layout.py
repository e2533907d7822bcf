"""Which files of a directory hold the weights: the index, or a single safetensors file."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from ..errors import BadCheckpoint
from .files import is_plain_name, read_bytes
from .strict import parse_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX = 64 << 20
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def find_shards(root: pathlib.Path) -> dict[str, set[str] | None]:
    """Shard file name -> tensors that the index puts there (None without an index).

    Raises BadCheckpoint when `root` is no directory, holds weights in a format that runs code
    when it is read, or leaves open which files count.
    """
    try:
        present = set(os.listdir(root))
    except FileNotFoundError:
        raise BadCheckpoint(
            "there is no such directory",
            where=str(root),
            need="a model directory",
            hint="check the spelling; moec downloads nothing",
        ) from None
    except NotADirectoryError:
        raise BadCheckpoint(
            "this is a file, not a model directory",
            where=str(root),
            need="a directory with config.json and *.safetensors",
            hint=f"pass {root.parent} if the file lies beside its config.json",
        ) from None
    except (OSError, ValueError) as error:
        raise BadCheckpoint(
            f"cannot be listed: {error}",
            where=str(root),
            need="a readable directory",
            hint="check the spelling and the permissions",
        ) from None
    if INDEX in present:
        files = _read_index(root)
        if SINGLE in present and SINGLE not in files:
            raise BadCheckpoint(
                f"both {SINGLE} and {INDEX} are there, and the index does not name the first",
                where=str(root),
                need="one set of weights",
                hint="remove the one that is out of date",
            )
        return files
    if SINGLE in present:
        return {SINGLE: None}
    raise _no_weights(root, present)


def _read_index(root: pathlib.Path) -> dict[str, set[str] | None]:
    where = str(root / INDEX)
    index = parse_object(read_bytes(root, INDEX, MAX_INDEX), where, nonfinite=False)
    table: Any = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise BadCheckpoint(
            "the index has no weight_map",
            where=where,
            need="a map of tensor names to file names",
            hint="download the index again",
        )
    files: dict[str, set[str]] = {}
    for tensor, file in table.items():
        if isinstance(file, str) and file in files:  # judged before: an index repeats its files
            files[file].add(tensor)
            continue
        if not isinstance(file, str) or not is_plain_name(file):
            raise BadCheckpoint(
                f"the index puts tensor {tensor!r} into {file!r}, which is not a plain file name",
                where=where,
                need="files directly inside the checkpoint directory",
                hint="do not use this checkpoint: a path in it points elsewhere",
            )
        if not file.endswith(".safetensors"):
            raise _wrong_format(where, file)
        files[file] = {tensor}
    return dict(sorted(files.items()))


def _no_weights(root: pathlib.Path, present: set[str]) -> BadCheckpoint:
    pickled = sorted(name for name in present if name.endswith(_PICKLED))
    if pickled:
        return _wrong_format(str(root), pickled[0])
    gguf = sorted(name for name in present if name.endswith((".gguf", ".onnx")))
    if gguf:
        return BadCheckpoint(
            f"{gguf[0]!r} is in a format that moec does not read",
            where=str(root),
            need="config.json and *.safetensors",
            hint="use the checkpoint from which this file was made",
        )
    other = sorted(name for name in present if name.endswith(".safetensors"))
    listed = f"; there is {', '.join(map(repr, other[:3]))}" if other else ""
    return BadCheckpoint(
        "no weights were found",
        where=str(root),
        need=f"{SINGLE} or {INDEX}{listed}",
        hint="pass the directory that holds config.json and the safetensors files",
    )


def _wrong_format(where: str, file: str) -> BadCheckpoint:
    if file.endswith(_PICKLED):
        return BadCheckpoint(
            f"{file!r} is a pickle, and reading a pickle runs code from it",
            where=where,
            need="*.safetensors",
            hint="convert it where you trust it: AutoModelForCausalLM.from_pretrained(PATH)"
            ".save_pretrained(NEW)",
        )
    return BadCheckpoint(
        f"{file!r} is not a safetensors file",
        where=where,
        need="names that end in .safetensors",
        hint="download the index again",
    )
