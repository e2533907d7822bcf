"""Files of a checkpoint that are damaged, hostile, of another format, or not where they belong.

All are refused with BadCheckpoint before a tensor is read.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from tests.bad_inputs.rows import INDEX, SINGLE, UP, Damage, Row, outside, replaced
from tests.checkpoint import raw

SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


def file(change: Callable[[bytes], bytes], name: str = SINGLE) -> Damage:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def head(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return lambda path: raw.edit(path / SINGLE, change)


def text(change: Callable[[str], str]) -> Damage:
    """Change the header's text; the data stays."""

    def damage(path: Path) -> None:
        whole = (path / SINGLE).read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        new = change(whole[8 : 8 + length].decode()).encode()
        (path / SINGLE).write_bytes(raw.pack(new, whole[8 + length :]))

    return damage


def index(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(path: Path) -> None:
        data = json.loads((path / INDEX).read_text())
        change(data["weight_map"])
        (path / INDEX).write_text(json.dumps(data))

    return damage


def moved(data: dict[str, Any], by: int) -> None:
    """Shift what follows the first tensor, which leaves a hole or an overlap."""
    entries = sorted(data.values(), key=lambda e: e["data_offsets"])
    for entry in entries[1:]:
        entry["data_offsets"] = [o + by for o in entry["data_offsets"]]


def set_field(name: str, **fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data[name].update(fields)


def rename(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data.update({new: data.pop(old)})


def add(name: str, entry: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """Another tensor without bytes, at the end of the data."""

    def change(data: dict[str, Any]) -> None:
        end = max(e["data_offsets"][1] for e in data.values())
        data[name] = {**entry, "data_offsets": [end, end]}

    return change


def double_key(header_text: str) -> str:
    """The header with the entry of UP written twice, equal both times."""
    found = re.search(re.escape(json.dumps(UP)) + r": ?\{[^}]*\}", header_text)
    assert found
    return header_text.replace(found[0], f"{found[0]},{found[0]}")


FILE: dict[str, Row] = {
    "empty": Row(file(lambda b: b""), "0 bytes are no safetensors file", SINGLE),
    "8 bytes": Row(file(lambda b: b[:8]), "8 bytes are no safetensors file", SINGLE),
    "cut in the header": Row(file(lambda b: b[:100]), "the header claims", SINGLE),
    "cut in the data": Row(file(lambda b: b[:-1]), "the file is truncated", SINGLE),
    "trailing byte": Row(file(lambda b: b + b"\0"), "the file has bytes after", SINGLE),
    "length 2^64-1": Row(
        file(lambda b: b"\xff" * 8 + b[8:]), "the header claims 18446744073709551615", SINGLE
    ),
    "length 2^63": Row(file(lambda b: struct.pack("<Q", 1 << 63) + b[8:]), "claims", SINGLE),
    "length 0": Row(file(lambda b: bytes(8) + b[8:]), "does not start with '{'", SINGLE),
    "length over 100 MB": Row(
        lambda p: (
            (p / SINGLE).write_bytes(struct.pack("<Q", 100_000_001)),
            os.truncate(p / SINGLE, 100_000_100),
        ),
        "the header claims 100000001 bytes", SINGLE,
    ),
    "not UTF-8": Row(file(lambda b: raw.pack(b'{"\xff": 1}')), "not UTF-8 at byte 2", SINGLE),
    "not JSON": Row(text(lambda t: t[:-1]), "not JSON", SINGLE),
    "JSON list": Row(file(lambda b: raw.pack(b"[1, 2]")), "does not start with '{'", SINGLE),
    "nested": Row(file(lambda b: raw.pack(b'{"a":' + b"[" * 99_999)), "nested too deep", SINGLE),
    "NaN": Row(text(lambda t: t.replace('"F32"', "NaN", 1)), "NaN is not JSON", SINGLE),
    "leading space": Row(text(lambda t: f" {t}"), "does not start with '{'", SINGLE),
    "hole": Row(head(lambda h: moved(h, 4)), "leaves a hole", SINGLE),
    "overlap": Row(head(lambda h: moved(h, -4)), "overlaps the tensor before it", SINGLE),
    "begin after end": Row(head(set_field(UP, data_offsets=[9, 5])), "data_offsets [9, 5]", SINGLE,
                           (UP,)),
    "negative offset": Row(head(set_field(UP, data_offsets=[-4, 188])), "[-4, 188]", SINGLE, (UP,)),
    "one offset": Row(head(set_field(UP, data_offsets=[0])), "data_offsets [0]", SINGLE, (UP,)),
    "offset true": Row(head(set_field(UP, data_offsets=[0, True])), "[0, True]", SINGLE, (UP,)),
    "negative shape": Row(head(set_field(UP, shape=[-6, -8])), "the shape [-6, -8]", SINGLE, (UP,)),
    "float shape": Row(head(set_field(UP, shape=[6.0, 8])), "the shape [6.0, 8]", SINGLE, (UP,)),
    "bytes for the shape": Row(head(set_field(UP, shape=[6, 9])), "does not fit 192 bytes", SINGLE,
                               (UP, "216 bytes")),
    "shape overflows": Row(head(set_field(UP, shape=[1 << 40, 1 << 40])), "the absurd shape",
                           SINGLE, (UP,)),
    "rank 9": Row(head(set_field(UP, shape=[6, 8] + [1] * 7)), "the shape", SINGLE,
                  (UP, "at most 8 sizes")),
    "no rows, huge rest": Row(head(add("z", {"dtype": "F32", "shape": [0, 1 << 62]})),
                              "tensor 'z' has the absurd shape", SINGLE),
    "unknown dtype": Row(head(set_field(UP, dtype="F7")), "the unknown dtype 'F7'", SINGLE, (UP,)),
    "dtype no text": Row(head(set_field(UP, dtype=["F32"])), "unknown dtype ['F32']", SINGLE),
    "unknown field": Row(head(set_field(UP, note="x")), "is not described by dtype, shape", SINGLE,
                         (UP,)),
    "field gone": Row(head(lambda h: h[UP].pop("shape")), "is not described by", SINGLE, (UP,)),
    "key twice": Row(text(double_key), f"the key {UP!r} occurs twice", SINGLE),
    "name empty": Row(head(rename(UP, "")), "'' is no tensor name", SINGLE),
    "name with NUL": Row(head(rename(UP, "a\0b")), r"'a\x00b' is no tensor name", SINGLE),
    "name with escape": Row(head(rename(UP, "\x1b[2J")), r"'\x1b[2J' is no tensor", SINGLE),
    "name with surrogate": Row(head(rename(UP, "\ud800")), r"'\ud800' is no tensor name", SINGLE),
    "name turned around": Row(head(rename(UP, "a\u202eb")), r"'a\u202eb' is no tensor", SINGLE),
    "name too long": Row(head(rename(UP, "n" * 1025)), "is no tensor name", SINGLE),
    "metadata": Row(head(lambda h: h.update(__metadata__={"n": 1})), "is not a map of strings",
                    SINGLE),
    "folder": Row(replaced(Path.mkdir), "this is not a regular file", SINGLE),
    "fifo": Row(replaced(os.mkfifo), "this is not a regular file", SINGLE),
    "device": Row(replaced(lambda p: p.symlink_to("/dev/zero")), "is a link that leaves", SINGLE),
    "link outside": Row(replaced(outside), "is a link that leaves the checkpoint", SINGLE),
    "link to nothing": Row(replaced(lambda p: p.symlink_to("gone")), "is missing", SINGLE),
    "link to itself": Row(replaced(lambda p: p.symlink_to(SINGLE)), "cannot be resolved", SINGLE),
}  # fmt: skip


def twice(path: Path) -> None:
    """UP in its own file and in another one, and nothing else amiss."""
    table = json.loads((path / INDEX).read_text())["weight_map"]
    other = next(s for s in SHARDS[::-1] if s != table[UP])
    moved_here = {**load_file(path / other), UP: load_file(path / table[UP])[UP]}
    save_file(moved_here, path / other)


INDEXED: dict[str, Row] = {
    "path up": Row(index(lambda t: t.update({UP: "../model.safetensors"})),
                   f"puts tensor {UP!r} into '../model.safetensors', which is not a plain", INDEX),
    "path absolute": Row(index(lambda t: t.update({UP: "/etc/passwd"})), "'/etc/passwd'", INDEX,
                         (UP,)),
    "path with folder": Row(index(lambda t: t.update({UP: "a/m.safetensors"})), "'a/m.safe", INDEX),
    "path of Windows": Row(index(lambda t: t.update({UP: "..\\m.safetensors"})),
                           r"into '..\\m.safetensors'", INDEX, (UP,)),
    "path with drive": Row(index(lambda t: t.update({UP: "C:m.safetensors"})), "'C:m.safe", INDEX),
    "path with NUL": Row(index(lambda t: t.update({UP: "m\0.safetensors"})), r"'m\x00.s", INDEX),
    "path with surrogate": Row(index(lambda t: t.update({UP: "\ud800.safetensors"})), r"'\ud800",
                               INDEX),
    "path empty": Row(index(lambda t: t.update({UP: ""})), "into '', which is not", INDEX, (UP,)),
    "path dots": Row(index(lambda t: t.update({UP: ".."})), "into '..', which is not", INDEX),
    "path number": Row(index(lambda t: t.update({UP: 3})), "into 3, which is not", INDEX, (UP,)),
    "path too long": Row(index(lambda t: t.update({UP: "m" * 300 + ".safetensors"})),
                         "cannot be resolved: ", "model"),
    "pickle": Row(index(lambda t: t.update({UP: "pytorch_model.bin"})),
                  "'pytorch_model.bin' is a pickle, and reading a pickle runs code", INDEX,
                  ("save_pretrained",)),
    "other suffix": Row(index(lambda t: t.update({UP: "model.gguf"})),
                        "'model.gguf' is not a safetensors file", INDEX),
    "missing shard": Row(lambda p: (p / SHARDS[1]).unlink(), f"the file {SHARDS[1]} is missing",
                         "model", (SHARDS[1],)),
    "shard outside": Row(replaced(outside, SHARDS[0]), f"{SHARDS[0]} is a link that leaves",
                         SHARDS[0]),
    "shard is a fifo": Row(replaced(os.mkfifo, SHARDS[2]), "not a regular file", SHARDS[2]),
    "listed elsewhere": Row(
        index(lambda t: t.update({UP: next(s for s in SHARDS if s != t[UP])})),
        "the index lists tensors in model-", "-of-00003.safetensors", (UP,)),
    "listed, not stored": Row(index(lambda t: t.update({"ghost\x1b": SHARDS[0]})),
                              f"lists tensors in {SHARDS[0]} that it does not hold", SHARDS[0],
                              (r"'ghost\x1b'",)),
    "stored, not listed": Row(index(lambda t: t.pop(UP)), "that the index does not list there",
                              "-of-00003.safetensors", (UP,)),
    "stored twice": Row(
        twice, f"tensor {UP!r} is in {SHARDS[1]} and in {SHARDS[2]}", "model",
        ("every tensor in one file",)),
    "no map": Row(lambda p: (p / INDEX).write_text("{}"), "the index has no weight_map", INDEX),
    "empty map": Row(index(lambda t: t.clear()), "the index has no weight_map", INDEX),
    "key twice": Row(
        lambda p: (p / INDEX).write_text('{"weight_map": {"a": "x", "a": "x"}}'),
        "the key 'a' occurs twice", INDEX),
    "not JSON": Row(lambda p: (p / INDEX).write_text("{"), "not JSON", INDEX),
    "list": Row(lambda p: (p / INDEX).write_text("[]"), "holds a list, not an object", INDEX),
    "too large": Row(lambda p: os.truncate(p / INDEX, (64 << 20) + 1), "67108865 bytes are", INDEX),
    "fifo": Row(replaced(os.mkfifo, INDEX), "not a regular file", INDEX),
    "link outside": Row(replaced(outside, INDEX), f"{INDEX} is a link that leaves", INDEX),
    "two sets": Row(lambda p: save_file({"w": raw.f32(1)}, p / SINGLE),
                    f"both {SINGLE} and {INDEX} are there", "model", ("out of date",)),
}  # fmt: skip


def only(name: str) -> Damage:
    return lambda path: os.rename(path / SINGLE, path / name)


FORMAT: dict[str, Row] = {
    **{
        f"only {name}": Row(only(name), f"{name!r} is a pickle, and reading a pickle runs code",
                            "model", ("*.safetensors", "save_pretrained"))
        for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "last.ckpt")
    },
    "only GGUF": Row(only("model.gguf"), "'model.gguf' is in a format that moec does not read",
                     "model"),
    "only ONNX": Row(only("model.onnx"), "'model.onnx' is in a format that", "model"),
    "other name": Row(only("consolidated.safetensors"), "no weights were found", "model",
                      ("there is 'consolidated.safetensors'", SINGLE)),
    "no weights": Row(lambda p: (p / SINGLE).unlink(), "no weights were found", "model", (SINGLE,)),
}  # fmt: skip
