"""What all tests share: tiny transformers models, built and saved once a session."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Saved:
    """A tiny model and the directory that its save_pretrained wrote; treat both as read-only."""

    path: pathlib.Path
    model: Any


SavedModels = Callable[[str, str, str], Saved]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedModels:
    """saved(family, variant, dtype) -> Saved, see tests/models.py; each is made once.

    torch and transformers are imported by the first call, so tests that do without stay fast.
    """

    @functools.cache
    def make(family: str, variant: str, dtype: str) -> Saved:
        from tests import models

        path = tmp_path_factory.mktemp(f"{family}-{variant}-{dtype}") / "model"
        return Saved(path, models.tiny(family, variant, dtype, path))

    return make
