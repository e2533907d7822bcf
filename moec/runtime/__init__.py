"""Runs compiled artifacts: needs libtvm_ffi and libtvm_runtime, never the compiler half."""

from .module import Block, Model, load

__all__ = ["Block", "Model", "load"]
