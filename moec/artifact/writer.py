"""Writes an artifact so that a reader sees the old one, the new one or none, never a part.

    with ArtifactWriter(path) as writer:
        writer.add_file("lib/cpu.so", built)
        with writer.tensors("weights/layer-00000.safetensors", layout) as out:
            out.write("gate_up", packed_slice)  # many times, in layout order
        digest = writer.finish(document)

`document` is the manifest without "files", "digest", "format" and "format_version", which
the writer knows. Nothing of time, host or place goes into it: equal input, equal bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..errors import UsageError
from . import disk
from .manifest import FORMAT_VERSION, MANIFEST, encode
from .parse import check_name, parse
from .tensorfile import TensorFileWriter, plan

_CHUNK = 1 << 20


class ArtifactWriter:
    """Stages an artifact beside `path` and renames it there in `finish`.

    An existing artifact is refused (UsageError) unless `force`; anything that is no artifact
    is never replaced. Raises ResourceError when the disk is full. Leaving the `with` block
    before `finish` deletes what was staged.
    """

    def __init__(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        self.path = Path(os.path.abspath(path))
        self.force = force
        self._files: dict[str, dict[str, Any]] = {}
        self._lock: int | None = None
        if not self.path.parent.is_dir():
            raise UsageError(
                "the folder of the artifact does not exist",
                where=str(self.path.parent),
                hint=f"mkdir -p {self.path.parent}",
            )
        self._check_existing()
        with disk.errors(self.path):
            disk.sweep(self.path)
            self._stage = disk.sibling(self.path, "tmp")
            os.mkdir(self._stage)
            self._lock = disk.lock(self._stage)

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._stage, ignore_errors=True)  # gone already after finish()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def add_bytes(self, name: str, data: bytes) -> None:
        """Store `data` as file `name`."""
        with self._create(name) as file, disk.errors(self.path):
            file.write(data)
            self._sync(file)
        self._files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}

    def add_file(self, name: str, source: str | os.PathLike[str]) -> None:
        """Store a copy of the file `source` as file `name`."""
        digest, size = hashlib.sha256(), 0
        with open(source, "rb") as origin, self._create(name) as file, disk.errors(self.path):
            while chunk := origin.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
                size += len(chunk)
            self._sync(file)
        self._files[name] = {"sha256": digest.hexdigest(), "bytes": size}

    @contextlib.contextmanager
    def tensors(
        self, name: str, layout: Sequence[tuple[str, str, tuple[int, ...]]]
    ) -> Iterator[TensorFileWriter]:
        """Store a weight file of (name, dtype, shape) triples, filled in that order.

        Refuses at once (ResourceError) when the whole file cannot fit on the disk.
        """
        header, entries = plan(layout)
        disk.need_space(self._stage, len(header) + sum(entry.bytes for entry in entries))
        with self._create(name) as file:
            writer = TensorFileWriter(file, layout, self.path)
            yield writer
            sha256 = writer.finish()
            with disk.errors(self.path):
                self._sync(file)
        self._files[name] = {"sha256": sha256, "bytes": writer.bytes}

    def finish(self, document: Mapping[str, Any]) -> str:
        """Write the manifest last, put the artifact in its place and return its digest."""
        own = {"format": "moec", "format_version": FORMAT_VERSION, "files": self._files}
        data, digest = encode({**document, **own})
        parse(data)  # what a reader would refuse is not written
        with disk.errors(self.path):
            with open(self._stage / MANIFEST, "xb") as file:
                file.write(data)
                self._sync(file)
            disk.sync_tree(self._stage)
            self._publish()
            disk.sync(self.path.parent)
        return digest

    def _check_existing(self) -> None:
        if not os.path.lexists(self.path) or _is_empty(self.path):
            return
        if not is_artifact(self.path):
            raise UsageError(
                "the output exists and is not an artifact, so it is not replaced",
                where=str(self.path),
                hint="choose another output, or delete it yourself",
            )
        if not self.force:
            raise UsageError(
                "the output exists",
                where=str(self.path),
                hint="choose another output, or replace it with --force (force=True)",
            )

    @contextlib.contextmanager
    def _create(self, name: str) -> Iterator[IO[bytes]]:
        check_name(name)
        path = self._stage / name
        with disk.errors(self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "xb")
        try:
            yield file
        finally:
            with contextlib.suppress(OSError):  # what matters was flushed by _sync
                file.close()

    @staticmethod
    def _sync(file: IO[bytes]) -> None:
        file.flush()
        os.fsync(file.fileno())

    def _publish(self) -> None:
        aside = []
        try:
            while True:
                try:
                    os.rename(self._stage, self.path)
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                self._check_existing()
                # A folder cannot be renamed over a full one, so the old one steps aside.
                old = disk.sibling(self.path, "old")
                with contextlib.suppress(FileNotFoundError):
                    os.rename(self.path, old)
                    aside.append(old)
        except BaseException:
            if aside and not os.path.lexists(self.path):
                os.rename(aside.pop(), self.path)
            raise
        finally:
            for old in aside:
                shutil.rmtree(old, ignore_errors=True)


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder with a manifest that calls itself a moec artifact."""
    try:
        with open(Path(path) / MANIFEST, "rb") as file:
            return bool(json.load(file).get("format") == "moec")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
