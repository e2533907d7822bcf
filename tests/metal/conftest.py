"""The emulated device, and artifacts of the nine families compiled for it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import moec
from tests import models
from tests.conftest import Saved
from tools.metal_emulator import install

SCHEDULES = ("tiles32", "tiles64", "gather", "loop")


@dataclass(frozen=True)
class Compiled:
    """A model, the same weights in float32, the artifact and the artifact loaded."""

    model: Any
    twin: Any
    path: Path
    loaded: Any


Get = Callable[[str, str, str], Compiled]


@pytest.fixture(scope="session", autouse=True)
def device() -> None:
    install()
    gc.collect()
    gc.freeze()  # what torch and TVM imported is never garbage, and costs a tenth of the time


@pytest.fixture(scope="session")
def compiled(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Get:
    """(family, variant, dtype) -> compiled for the emulated device with every schedule."""
    made: dict[tuple[str, str, str], Compiled] = {}

    def get(family: str, variant: str, dtype: str) -> Compiled:
        key = (family, variant, dtype)
        if key not in made:
            model, path = saved(*key)
            out = tmp_path_factory.mktemp("metal") / "m.moec"
            moec.compile(path, target="metal:emulated", out=out, schedules=SCHEDULES)
            twin = model if dtype == "float32" else models.widened(model)
            made[key] = Compiled(model, twin, out, moec.load(out, device="metal:0"))
        return made[key]

    return get
