"""The GPU and the compiled cases, for the tests of this folder; without a GPU all are skipped."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@functools.cache
def missing() -> str | None:
    """Why nothing here can run, or None."""
    try:
        import torch
    except ImportError as error:
        return f"torch is not installed ({error})"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"the cases are for Hopper, this is a {torch.cuda.get_device_name()}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if reason and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"nothing ran on a GPU: {reason}"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the compiled cases are: $MOEC_GPU_CASES, or made now."""
    if given := os.environ.get("MOEC_GPU_CASES"):
        return Path(given)
    from . import families, make

    out = tmp_path_factory.mktemp("gpu")
    make.make(out)
    families.make(out / "families")
    return out


@pytest.fixture(autouse=True)
def sound() -> Iterator[None]:
    """A launch that failed is the fault of the test that made it."""
    yield
    import torch

    torch.cuda.synchronize()
