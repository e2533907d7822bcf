"""The libraries with all blocks of `cases`, built once a session."""

from __future__ import annotations

import pytest

from tests.blocks import Built, built
from tests.compiler.cases import CASES


@pytest.fixture(scope="session")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built(list(CASES.values()), tmp_path_factory.mktemp("kernels"), parts=2)
