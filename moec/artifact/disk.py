"""Staging folders beside an artifact, and what a full or unwritable disk is called.

A staging folder is `.NAME.tmp-<pid>-<random>`, and an artifact that is being replaced is
`.NAME.old-<pid>-<random>` while it is deleted. One whose process is dead is swept by the
next writer of the same artifact. The lock on the folder keeps a process in another
container, whose pid means nothing here, from losing its work.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import ResourceError, UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def errors(path: Path) -> Iterator[None]:
    """Turn OSError while writing below `path` into ResourceError (full) or UsageError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceError(
                f"the disk is full ({error.strerror})",
                where=str(path),
                hint="free space or write elsewhere; nothing partial was left behind",
            ) from None
        raise UsageError(
            f"cannot write: {error.strerror or error}",
            where=str(error.filename or path),
            need="a folder that can be written",
        ) from None


def need_space(path: Path, size: int) -> None:
    """Raise ResourceError when `size` bytes cannot fit beside `path`."""
    free = shutil.disk_usage(path).free
    if size > free:
        raise ResourceError(
            f"the artifact needs {size / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free",
            where=str(path),
            hint="free space, choose another output, or compile with weights='reference'",
        )


def sibling(path: Path, kind: str) -> Path:
    """A fresh hidden name beside `path`; kind is "tmp" or "old"."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def lock(folder: Path) -> int | None:
    """Hold an exclusive lock on `folder`: a file descriptor, or None if another holds it."""
    import fcntl  # only writers need it, and it does not exist on every system

    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:  # a file system without locks: the pid alone must do
        pass
    return fd


def sweep(path: Path) -> None:
    """Delete what dead writers of `path` left beside it."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(?:tmp|old)-(\d+)-[0-9a-f]{8}")
    for entry in path.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not _alive(int(match[1])):
            with contextlib.suppress(OSError):
                fd = lock(entry)
                if fd is not None:
                    shutil.rmtree(entry, ignore_errors=True)
                    os.close(fd)


def sync_tree(folder: Path) -> None:
    """Flush the entries of `folder` and of the folders below it to the disk."""
    for root, _, _ in os.walk(folder, topdown=False):
        sync(Path(root))


def sync(folder: Path) -> None:
    """Flush the entries of one folder to the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
