"""From a model directory to blocks: families are data (families/*.toml), one interpreter."""

from .build import Block
from .family import Family, builtin, load
from .model import Model, find_problems, outline, read_model, survey

__all__ = [
    "Block",
    "Family",
    "Model",
    "builtin",
    "find_problems",
    "load",
    "outline",
    "read_model",
    "survey",
]
