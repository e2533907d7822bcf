"""Artifacts: what the compiler half writes and the runtime half reads, and all they share."""

from .manifest import Block, Function, Manifest, Packed, Target, TargetShape, TensorType, Variant
from .reader import Artifact, Verify
from .tensorfile import Entry, TensorFileWriter, read_entries
from .writer import ArtifactWriter, is_artifact

__all__ = [
    "Artifact",
    "ArtifactWriter",
    "Block",
    "Entry",
    "Function",
    "Manifest",
    "Packed",
    "Target",
    "TargetShape",
    "TensorFileWriter",
    "TensorType",
    "Variant",
    "Verify",
    "is_artifact",
    "read_entries",
]
