"""The CUDA backend on a GPU: `pytest tests/gpu`. Elsewhere it is skipped, and says so.

Cases are compiled where the compiler is: `python -m tests.gpu.make DIR`. On a GPU machine that
has only the runtime, $MOEC_GPU_CASES names that folder; without it they are compiled first.
"""
