"""Every block, schedule and token count on a GPU: right, whatever memory held, and repeatable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moec

from . import cases, families
from .make import ARTIFACTS, ROUTINGS, sample
from .run import error, limit_tokens, load, tensor

PAIRS = [
    pytest.param(artifact, name, schedule, id=f"{artifact}-{name}-{schedule}")
    for artifact, (_, table) in ARTIFACTS.items()
    for name, small in table.items()
    for schedule in small.schedules
]


@pytest.mark.parametrize(("artifact", "name", "schedule"), PAIRS)
def test_results(folder: Path, artifact: str, name: str, schedule: str) -> None:
    case = load(folder, artifact)[name]
    limit = cases.TOLERANCE[case.block.spec.dtype]
    for tokens in cases.TOKENS:
        if not limit_tokens(schedule, tokens):
            continue
        given, rows = case.inputs(tokens), torch.from_numpy(sample(tokens)).cuda()
        ids, weights = case.route(given, schedule)
        y = case.moe(given, schedule)
        routed = {r: case.experts(given, r, schedule) for r in ROUTINGS}
        if not tokens:
            assert y.shape == given["x"].shape and ids.shape == weights.shape
            continue
        for got in (y, weights, *routed.values()):
            assert torch.isfinite(got.float()).all(), (tokens, "not every element was written")
        np.testing.assert_array_equal(ids[rows].cpu().numpy(), case.want(tokens, "ids"))
        errors = {"topk_weights": error(weights[rows], case.want(tokens, "topk_weights"))}
        assert errors["topk_weights"] <= 1e-5, (tokens, errors)
        for key, got in {"moe": y, **routed}.items():
            errors[key] = error(got[rows], case.want(tokens, key))
            assert errors[key] <= limit, (tokens, errors)


@pytest.mark.parametrize(("artifact", "name", "schedule"), PAIRS)
def test_twenty_runs_give_the_same_bits(
    folder: Path, artifact: str, name: str, schedule: str
) -> None:
    case = load(folder, artifact)[name]
    for tokens in (7, 257):
        if not limit_tokens(schedule, tokens):
            continue
        given = case.inputs(tokens)
        first = case.moe(given, schedule).view(torch.uint8).clone()
        for _ in range(19):
            again = case.moe(given, schedule)
            assert torch.equal(first, again.view(torch.uint8)), tokens


def test_families(folder: Path) -> None:
    places = sorted(p for p in (folder / "families").iterdir() if (p / "m.moec").exists())
    assert len(places) >= 70
    bad: dict[str, Any] = {}
    for place in places:
        try:
            worst = _family(place)
        except moec.MoecError as problem:
            bad[place.name] = problem
            continue
        if not worst <= families.TOLERANCE:
            bad[place.name] = worst
    assert not bad, f"{len(bad)} of {len(places)} families: {bad}"


def _family(place: Path) -> float:
    """The largest error of a family; infinite when it chooses other experts."""
    model, held = moec.load(place / "m.moec", device="cuda:0"), np.load(place / "expected.npz")
    worst = 0.0
    for layer, tokens in sorted({tuple(map(int, k.split("/")[:2])) for k in held.files}):
        block = model[layer]
        own = {n: held[f"{layer}/{tokens}/{n}"] for n in
               ("x", "shared_x", "token_ids", "y", "ids", "topk_weights")}  # fmt: skip
        x, shared = tensor(own["x"]), block.spec.shared
        ids = {"token_ids": tensor(own["token_ids"])} if block.spec.router.vocab_size else {}
        second = shared is not None and shared.own_input
        extra = {**ids, **({"shared_x": tensor(own["shared_x"])} if second else {})}
        for schedule in families.SCHEDULES:
            got_ids, weights = block.route(x, schedule=schedule, **ids)
            order = torch.argsort(got_ids, dim=1, stable=True)
            want = np.argsort(own["ids"], axis=1, kind="stable")
            if not np.array_equal(torch.gather(got_ids, 1, order).cpu().numpy(),
                                  np.take_along_axis(own["ids"], want, 1)):  # fmt: skip
                return float("inf")
            sorted_weights = np.take_along_axis(own["topk_weights"], want, 1)
            errors = (
                error(torch.gather(weights, 1, order), sorted_weights),
                error(block(x, schedule=schedule, **extra), own["y"]),
            )
            worst = max(worst, *errors)
    return worst
