"""Artifacts: what the compiler half writes and the runtime half reads, and all they share."""

from .manifest import Block, Function, Manifest, Packed, Target, TargetShape, TensorType, Variant
from .memory import ALIGNMENT, aligned, anonymous, mapped
from .reader import Artifact, Verify
from .tensorfile import Entry, TensorFileWriter, read_entries
from .writer import ArtifactWriter, is_artifact

__all__ = [
    "ALIGNMENT",
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
    "aligned",
    "anonymous",
    "is_artifact",
    "mapped",
    "read_entries",
]
