"""What must not change a result: the numbers of the experts, the order and the split of tokens.

Permuted tokens and split batches give the same bits, as the schedules are deterministic and a
token's result depends on that token alone (within one schedule; which one is chosen by T is
fixed here). Renumbered experts are added in another order: 1e-6 relative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moec

from .. import objects as compiled_once
from . import published, tiny
from .test_families import SCHEDULES, TARGET, error

# A family each for groups and bias, zero experts, norms of every row, mixed sums, a plain one.
FAMILIES = ("deepseek_v3", "longcat_flash", "muse_spark_text", "klear", "olmoe")
PERMUTED = ("deepseek_v3", "olmoe", "klear")
Compiled = Callable[[Path], Any]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    with pytest.MonkeyPatch.context() as patch:
        compiled_once.install(compiled_once.Objects(tmp_path_factory.mktemp("objects")), patch)
        made: dict[Path, Any] = {}

        def get(path: Path) -> Any:
            if path not in made:
                out = tmp_path_factory.mktemp("artifact") / "m.moec"
                moec.compile(path, target=TARGET, out=out, schedules=SCHEDULES)
                made[path] = moec.load(out, threads=1)
            return made[path]

        yield get


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("saved") / "model"
            if family in published.FAMILIES:
                published.write(family, "a", made[family])
            else:
                tiny.tiny(family, "a", made[family])
        return made[family]

    return get


def last(model: Any) -> Any:
    return model[model.layers[-1]]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_independent(
    compiled: Compiled, saved: Callable[[str], Path], family: str, schedule: str
) -> None:
    block, random = last(compiled(saved(family))), np.random.default_rng(3)
    x = random.normal(size=(40, block.spec.experts.hidden_size)).astype(np.float32)
    whole, order = block(x, schedule=schedule), random.permutation(40)
    np.testing.assert_array_equal(block(x[order].copy(), schedule=schedule), whole[order])
    parts = [block(part.copy(), schedule=schedule) for part in np.split(x, [1, 18])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("family", PERMUTED)
def test_experts_have_no_order(
    compiled: Compiled, saved: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    source = saved(family)
    before, random = last(compiled(source)), np.random.default_rng(4)
    order = random.permutation(before.spec.experts.num_experts)
    if before.spec.router.groups is not None:  # groups move as a whole, experts within them too
        size = len(order) // before.spec.router.groups.count
        groups = random.permutation(before.spec.router.groups.count)
        order = np.concatenate([g * size + random.permutation(size) for g in groups])
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text((source / "config.json").read_text())
    save_file(
        _renumbered(load_file(source / "model.safetensors"), order), path / "model.safetensors"
    )
    after = last(compiled(path))
    x = random.normal(size=(33, before.spec.experts.hidden_size)).astype(np.float32)
    ids, _ = before.route(x)
    moved, _ = after.route(x)
    np.testing.assert_array_equal(np.sort(order[moved], axis=1), np.sort(ids, axis=1))
    for schedule in SCHEDULES:
        assert error(after(x, schedule=schedule), before(x, schedule=schedule)) <= 1e-6


def _renumbered(tensors: dict[str, Any], order: Any) -> dict[str, Any]:
    """Expert n of the result is expert order[n] of `tensors`, with its router row and bias."""
    out = {}
    for name, value in tensors.items():
        head, found, tail = name.partition(".experts.")
        if found and tail.split(".")[0].isdigit():
            number, _, rest = tail.partition(".")
            value = tensors[f"{head}.experts.{order[int(number)]}.{rest}"]
        elif name.endswith(("mlp.gate.weight", "e_score_correction_bias", "mlp.expert_bias")):
            value = value[order]
        out[name] = np.ascontiguousarray(value)
    return out
