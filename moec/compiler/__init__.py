"""The compiler: a checkpoint in, an artifact out. `compile` reads the pipeline top to bottom."""

from .compile import compile
from .options import STAGES, CompileOptions
from .report import Report

__all__ = ["STAGES", "CompileOptions", "Report", "compile"]
