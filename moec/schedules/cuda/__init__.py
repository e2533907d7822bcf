"""Schedules for NVIDIA GPUs: kernels as TIRx functions, compiled to cubins by NVRTC."""
