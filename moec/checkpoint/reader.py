"""Checkpoint: config and tensors of a model directory, mapped read-only, headers checked once."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import mmap
import os
import pathlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from ..errors import BadCheckpoint
from .files import Identity, contained, opened, read_bytes
from .header import DTYPES, Entry, dtype_name, read_header
from .layout import find_shards
from .strict import parse_object

MAX_CONFIG = 1 << 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk; `file` is the plain name of its shard."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}"


@dataclass
class _Shard:
    path: pathlib.Path
    identity: Identity
    map: mmap.mmap | None = None


class Checkpoint:
    """A directory with config.json and safetensors files. `Checkpoint.open` makes one.

    Opening reads the config and every header, nothing else; tensors are mapped when they are
    first read. Safe to use from several threads. A file that shrinks while it is mapped can
    still end the process (SIGBUS), so each read checks first that the file is unchanged.
    """

    def __init__(
        self,
        path: pathlib.Path,
        config: dict[str, Any],
        config_bytes: bytes,
        shards: dict[str, _Shard],
        entries: dict[str, tuple[str, Entry]],
    ) -> None:
        self.path = path
        self.config = config
        self._config_bytes = config_bytes
        self._shards = shards
        self._entries = entries
        self._lock = threading.Lock()
        self._closed = False
        self._tensors = {
            name: TensorInfo(name, entry.shape, dtype_name(entry.code), file)
            for name, (file, entry) in entries.items()
        }
        self._sorted = sorted(entries)

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Checkpoint:
        """Open the model directory `path`; raises BadCheckpoint on anything suspicious."""
        root = pathlib.Path(path)
        files = find_shards(root)
        data = read_bytes(root, "config.json", MAX_CONFIG)
        # NaN and Infinity are left to the frontend, which checks every number that it uses.
        config = parse_object(data, str(root / "config.json"), nonfinite=True)
        shards: dict[str, _Shard] = {}
        entries: dict[str, tuple[str, Entry]] = {}
        for name, listed in files.items():
            real = contained(root, name)
            header = read_header(real, str(root / name))
            shards[name] = _Shard(real, header.identity)
            for entry in header.entries:
                if entry.name in entries:
                    raise BadCheckpoint(
                        f"tensor {entry.name!r} is in {entries[entry.name][0]} and in {name}",
                        where=str(root),
                        need="every tensor in one file",
                        hint="download the index and the files again",
                    )
                entries[entry.name] = (name, entry)
            if listed is not None:
                _same_tensors(root, name, listed, {e.name for e in header.entries})
        return Checkpoint(root, config, data, shards, entries)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, from the headers only."""
        return MappingProxyType(self._tensors)

    def names_under(self, prefix: str) -> list[str]:
        """Sorted names of the tensors that start with `prefix`, in logarithmic time."""
        low = bisect.bisect_left(self._sorted, prefix)
        high = bisect.bisect_left(self._sorted, prefix + chr(0x10FFFF), lo=low)
        return self._sorted[low:high]

    def read(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """A read-only view of tensor `name`, shape and dtype as on disk, no copy.

        bfloat16 and float8 come as ml_dtypes. The view may be unaligned. Raises BadCheckpoint
        when the tensor is absent, of a packed dtype, or when its file changed since `open`.
        """
        try:
            file, entry = self._entries[name]
        except KeyError:
            raise BadCheckpoint(
                f"there is no tensor {name!r}",
                where=str(self.path),
                need="a tensor that one of the files holds",
                hint=f"'moec inspect {self.path}' lists every missing tensor",
            ) from None
        dtype = DTYPES[entry.code][1]
        if dtype is None:
            raise BadCheckpoint(
                f"tensor {name!r} has the packed dtype {entry.code}, which is not supported",
                where=str(self.path / file),
                need="float32, bfloat16 or float16",
                hint="use a checkpoint that is not quantized",
            )
        if entry.size == 0:
            return np.empty(entry.shape, dtype)
        data = self._map(file)
        count = entry.size // dtype.itemsize
        return np.frombuffer(data, dtype, count, entry.begin).reshape(entry.shape)

    def verify_unchanged(self) -> None:
        """Raise BadCheckpoint when a mapped file was changed, replaced or removed."""
        for name, shard in self._shards.items():
            if shard.map is not None:
                self._verify(name, shard)

    def release(self) -> None:
        """Let the system drop the pages that were read; views stay valid."""
        with self._lock:
            for shard in self._shards.values():
                if shard.map is not None and hasattr(mmap, "MADV_DONTNEED"):
                    shard.map.madvise(mmap.MADV_DONTNEED)

    def digest(self) -> dict[str, str]:
        """SHA-256 of the config's bytes and of the tensor list (name, dtype, shape)."""
        table = [[n, self._tensors[n].dtype, self._tensors[n].shape] for n in self._sorted]
        canonical = json.dumps(table, separators=(",", ":"), ensure_ascii=True).encode()
        return {
            "config_sha256": hashlib.sha256(self._config_bytes).hexdigest(),
            "tensors_sha256": hashlib.sha256(canonical).hexdigest(),
        }

    def close(self) -> None:
        """Unmap the files. A mapping with living views goes when the last view goes."""
        with self._lock:
            self._closed = True
            for shard in self._shards.values():
                if shard.map is not None:
                    with contextlib.suppress(BufferError):
                        shard.map.close()
                    shard.map = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _map(self, file: str) -> mmap.mmap:
        with self._lock:
            if self._closed:
                raise BadCheckpoint(
                    "the checkpoint is closed",
                    where=str(self.path),
                    need="an open Checkpoint",
                    hint="read inside the `with` block",
                )
            shard = self._shards[file]
            self._verify(file, shard)
            if shard.map is None:
                where = str(self.path / file)
                with opened(shard.path, where) as (fd, status):
                    if Identity.of(status) != shard.identity:
                        raise self._changed(file)
                    try:
                        shard.map = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
                    except (OSError, ValueError) as error:
                        raise BadCheckpoint(
                            f"cannot be mapped: {error}",
                            where=where,
                            need="address space and a descriptor for every file",
                            hint="raise `ulimit -v` and `ulimit -n`",
                        ) from None
            return shard.map

    def _verify(self, file: str, shard: _Shard) -> None:
        try:
            same = Identity.of(shard.path.stat()) == shard.identity
        except OSError:
            same = False
        if not same:
            raise self._changed(file)

    def _changed(self, file: str) -> BadCheckpoint:
        return BadCheckpoint(
            f"{file} changed while it was in use",
            where=str(self.path / file),
            need="files that stay as they are until moec is done",
            hint="wait until the download or copy is complete, then start again",
        )


def _same_tensors(root: pathlib.Path, file: str, listed: set[str], stored: set[str]) -> None:
    for problem, names in (
        (f"the index lists tensors in {file} that it does not hold", listed - stored),
        (f"{file} holds tensors that the index does not list there", stored - listed),
    ):
        if names:
            some = ", ".join(map(repr, sorted(names)[:5]))
            raise BadCheckpoint(
                f"{problem}: {some}" + (f" ({len(names)} in all)" if len(names) > 5 else ""),
                where=str(root / file),
                need="an index that agrees with the files",
                hint="download the index and the file again",
            )
