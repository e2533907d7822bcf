"""Models and artifacts that several test files share: each is made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Saved = Callable[[str, str, str], tuple[Any, Path]]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """(family, variant, dtype) -> (the transformers model, the directory it was saved in)."""
    from tests import models

    made: dict[tuple[str, str, str], tuple[Any, Path]] = {}

    def get(family: str, variant: str, dtype: str) -> tuple[Any, Path]:
        key = (family, variant, dtype)
        if key not in made:
            path = tmp_path_factory.mktemp("-".join(key))
            made[key] = models.tiny(*key, path), path
        return made[key]

    return get
