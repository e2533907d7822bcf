"""What the tables of damaged checkpoints share: a row, and ways to damage a directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.frontend import small

Damage = Callable[[Path], Any]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP, DOWN = small.expert(1, 2, "up"), small.expert(0, 3, "down")
ROUTER = small.ROUTER.format(layer=0)


@dataclass(frozen=True)
class Row:
    """What to do to a valid checkpoint, and what the error must say.

    `where` is the file to be named; `names` are further words in the whole error.
    """

    damage: Damage
    message: str
    where: str
    names: tuple[str, ...] = ()


def replaced(by: Callable[[Path], Any], name: str = SINGLE) -> Damage:
    """The file gone and something else in its place."""

    def damage(path: Path) -> None:
        os.rename(path / name, path.parent / "kept")
        by(path / name)

    return damage


def outside(path: Path) -> None:
    path.symlink_to(path.parent.parent / "kept")
