"""The only reader of untrusted bytes: config.json and safetensors, mapped, without torch."""

from .reader import Checkpoint, TensorInfo

__all__ = ["Checkpoint", "TensorInfo"]
