"""Opening files of a checkpoint directory: containment, regular files only, unchanged later."""

from __future__ import annotations

import contextlib
import os
import pathlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import BadCheckpoint


@dataclass(frozen=True)
class Identity:
    """What must stay equal for a mapped file to be the file whose header was read."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @staticmethod
    def of(status: os.stat_result) -> Identity:
        """The identity in a stat result."""
        return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def is_plain_name(name: str) -> bool:
    """Whether `name` can only mean a file directly inside a directory, on any system."""
    return (
        name not in ("", ".", "..")
        and name.isprintable()  # no control characters, and no lone surrogates
        and not any(c in "/\\:" for c in name)
    )


def contained(root: pathlib.Path, name: str) -> pathlib.Path:
    """The real path of file `name` of the checkpoint directory `root`.

    A symbolic link is followed only inside the directory, or into the `blobs` folder of a
    Hugging Face cache (models--x/snapshots/<revision>/name -> ../../blobs/<digest>).
    Raises BadCheckpoint for everything that leaves these two places.
    """
    if not is_plain_name(name):
        raise BadCheckpoint(
            f"{name!r} is not a plain file name",
            where=str(root),
            need="the name of a file directly inside the checkpoint directory",
            hint="do not use this checkpoint: a path in it points elsewhere",
        )
    path = root / name
    try:
        home = root.resolve(strict=True)
        real = path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise BadCheckpoint(
            f"the file {name} is missing",
            where=str(path),
            need="the file itself, or a link to it that leads somewhere",
            hint="download the checkpoint again",
        ) from None
    except (OSError, RuntimeError) as error:
        raise BadCheckpoint(
            f"{name} cannot be resolved: {error}",
            where=str(path),
            need="a file that exists",
            hint="download the checkpoint again",
        ) from None
    in_cache = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if real.parent != home and not (path.is_symlink() and in_cache):
        raise BadCheckpoint(
            f"{name} is a link that leaves the checkpoint directory",
            where=str(path),
            need="a file inside the directory, or a link into the blobs of a Hugging Face cache",
            hint="copy the file into the directory if you trust it",
        )
    return real


@contextlib.contextmanager
def opened(path: pathlib.Path, where: str) -> Iterator[tuple[int, os.stat_result]]:
    """A read-only descriptor of the regular file `path` and its status.

    Never blocks on a fifo and never follows a link in the last step (`path` is resolved).
    """
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        raise BadCheckpoint(
            f"cannot be opened: {error.strerror or error}",
            where=where,
            need="a readable file",
            hint="check its permissions, and `ulimit -n` if there are many files",
        ) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise BadCheckpoint(
                "this is not a regular file",
                where=where,
                need="a regular file",
                hint="put the file itself there",
            )
        yield fd, status
    finally:
        os.close(fd)


def read_bytes(root: pathlib.Path, name: str, limit: int) -> bytes:
    """The whole file `name` of `root`, refused when larger than `limit` bytes."""
    where = str(root / name)
    with opened(contained(root, name), where) as (fd, status):
        if status.st_size > limit:
            raise BadCheckpoint(
                f"{status.st_size} bytes are too many",
                where=where,
                need=f"at most {limit} bytes",
                hint="download the file again; no model needs one of this size",
            )
        return read_exactly(fd, status.st_size, 0, where)


def read_exactly(fd: int, count: int, offset: int, where: str) -> bytes:
    """`count` bytes from `offset`; BadCheckpoint when the file ends before that."""
    parts: list[bytes] = []
    while count > 0:
        try:
            part = os.pread(fd, min(count, 1 << 24), offset)
        except OSError as error:
            raise BadCheckpoint(
                f"cannot be read: {error}",
                where=where,
                need="a readable file",
                hint="check the disk, and download the file again",
            ) from None
        if not part:
            raise BadCheckpoint(
                "the file ends too early",
                where=where,
                need=f"{count} more bytes",
                hint="download the file again",
            )
        parts.append(part)
        offset += len(part)
        count -= len(part)
    return b"".join(parts)
