"""Opens an artifact: nothing of it is used before its manifest and hashes hold.

Hashes find damage and mix-ups, not malice: a library is native code, so load only what you
built or whose digest you trust.
"""

from __future__ import annotations

import concurrent.futures
import enum
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from .. import host
from ..errors import ArtifactError, UsageError
from .manifest import MANIFEST, MAX_BYTES, Manifest
from .parse import parse

WEIGHTS_SUFFIX = ".safetensors"


class Verify(str, enum.Enum):
    """How much of an artifact is checked when it is opened."""

    FULL = "full"  # every byte of every file
    LIBRARY = "library"  # every byte but those of weight files, of which only the size
    MANIFEST = "manifest"  # the manifest alone: enough to describe, not to load


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk whose manifest holds; `path` is its resolved folder."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | os.PathLike[str], verify: Verify | str = Verify.FULL) -> Artifact:
        """Read and check the artifact at `path`.

        Raises ArtifactError for damage, missing or extra files and versions that do not fit,
        UsageError when there is no artifact at `path` or `verify` is unknown.
        """
        try:
            level = Verify(verify)
        except ValueError:
            names = ", ".join(v.value for v in Verify)
            raise UsageError(f"verify={verify!r} is unknown", where="verify", need=names) from None
        root = Path(os.path.realpath(path))
        artifact = Artifact(root, parse(_read_manifest(root)))
        if level is not Verify.MANIFEST:
            artifact._check_versions()
            artifact._check_files(level)
        return artifact

    def file(self, name: str) -> Path:
        """Where file `name` of the manifest lies."""
        return self.path / name

    def _check_versions(self) -> None:
        for package, key in (("apache-tvm", "tvm"), ("apache-tvm-ffi", "tvm_ffi")):
            made, here = self.manifest.producer[key], host.installed(package)
            if not host.same_release(made, here):
                raise ArtifactError(
                    f"the artifact was made with {package} {made}, installed is {here}",
                    where=str(self.path / MANIFEST),
                    need=f"{package}=={made}",
                    hint=f"pip install {package}=={made}, or compile the artifact again",
                )

    def _check_files(self, level: Verify) -> None:
        found = _list_files(self.path)
        expected = self.manifest.files
        lacking, unknown = set(expected) - found, found - set(expected)
        for kind, names in (("lacks", lacking), ("has an unknown", unknown)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise _damaged(f"the artifact {kind} file {min(names)}{more}", self.path)
        for name, entry in expected.items():
            size = os.path.getsize(self.path / name)
            if size != entry.bytes:
                raise _damaged(f"{name} has {size} bytes, not {entry.bytes}", self.path / name)
        hashed = [
            name
            for name in sorted(expected, key=lambda n: -expected[n].bytes)
            if level is Verify.FULL or not name.endswith(WEIGHTS_SUFFIX)
        ]
        # hashlib lets other threads run, so files are hashed side by side.
        with concurrent.futures.ThreadPoolExecutor(max(1, min(host.cores(), len(hashed)))) as pool:
            for name, sha in zip(hashed, pool.map(self._sha256, hashed), strict=True):
                if sha != expected[name].sha256:
                    raise _damaged(f"{name} does not have the sha256 it should", self.path / name)

    def _sha256(self, name: str) -> str:
        digest, buffer = hashlib.sha256(), bytearray(1 << 20)
        view = memoryview(buffer)
        try:
            with open(self.path / name, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(view[:count])
        except OSError as error:
            raise _damaged(f"{name} cannot be read: {error.strerror}", self.path) from None
        return digest.hexdigest()


def _read_manifest(root: Path) -> bytes:
    path = root / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise _damaged("the manifest is not a regular file", path)
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            "there is no artifact here",
            where=str(root),
            need=f"a folder with {MANIFEST}, as 'moec compile' writes it",
        ) from None
    except OSError as error:
        raise _damaged(f"the manifest cannot be read: {error.strerror}", path) from None
    if len(data) > MAX_BYTES:
        raise _damaged(f"the manifest has more than {MAX_BYTES} bytes", path)
    return data


def _list_files(root: Path) -> set[str]:
    """Every file below `root` but the manifest; anything that is no plain file is refused."""
    names = set()
    for folder, folders, files in os.walk(root, onerror=_raise):
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise _damaged(f"{path.relative_to(root)} is neither a file nor a folder", path)
        names |= {Path(folder, name).relative_to(root).as_posix() for name in files}
    return names - {MANIFEST}


def _raise(error: OSError) -> None:
    raise _damaged(f"a folder cannot be read: {error.strerror}", Path(str(error.filename)))


def _damaged(what: str, where: Path) -> ArtifactError:
    return ArtifactError(
        what,
        where=str(where),
        need="the files that the manifest lists, unchanged",
        hint="copy the artifact again from where it was whole, or compile it again",
    )
