"""`moec verify`: hashes and consistency of an artifact, without loading code of it."""

from __future__ import annotations

import argparse

from ..artifact import Artifact
from ..errors import CheckFailed
from ..text import size
from .console import Console
from .here import reason


def run(args: argparse.Namespace, console: Console) -> int:
    """Print what was verified; raises ArtifactError, or CheckFailed for another digest."""
    console.progress("hashing")
    artifact = Artifact.open(args.artifact)
    manifest = artifact.manifest
    if args.digest and args.digest.lower() != manifest.digest:
        raise CheckFailed(
            "the artifact is whole, but it is not the one asked for",
            where=str(artifact.path),
            need=f"digest {args.digest.lower()}, it has {manifest.digest}",
            hint="get the artifact that belongs to the digest, or ask for this digest",
        )
    total = sum(entry.bytes for entry in manifest.files.values())
    reasons = {name: reason(target.requires) for name, target in manifest.targets.items()}
    if args.json:
        console.json(
            {
                "ok": True,
                "digest": manifest.digest,
                "files": len(manifest.files),
                "bytes": total,
                "runs_here": {name: why is None for name, why in reasons.items()},
            }
        )
        return 0
    console.data(f"ok      {len(manifest.files)} files, {size(total)}")
    console.data(f"digest  {manifest.digest}")
    for name, why in reasons.items():
        console.data(f"target  {name}: {why or 'runs here'}")
    return 0
