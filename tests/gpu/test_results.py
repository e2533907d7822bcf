"""Every block, schedule and token count on a GPU: right, whatever memory held, and repeatable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moec

from . import cases, families
from .data import ROUTINGS, sample
from .run import error, limit_tokens, load, tensor

PAIRS = [
    (artifact, name, schedule)
    for artifact, (_, table) in cases.ARTIFACTS.items()
    for name, (_, schedules) in table.items()
    for schedule in schedules
]
CELLS = [
    pytest.param(*pair, tokens, id=f"{'-'.join(pair)}-T{tokens}")
    for pair in PAIRS
    for tokens in cases.TOKENS
    if limit_tokens(pair[2], tokens)
]


@pytest.mark.parametrize(("artifact", "name", "schedule", "tokens"), CELLS)
def test_results(folder: Path, artifact: str, name: str, schedule: str, tokens: int) -> None:
    case = load(folder, artifact)[name]
    limit = cases.TOLERANCE[case.block.spec.dtype]
    given, rows = case.inputs(tokens), torch.from_numpy(sample(tokens)).cuda()
    ids, weights = case.route(given, schedule)
    results = {"moe": case.moe(given, schedule)}
    results |= {routing: case.experts(given, routing, schedule) for routing in ROUTINGS}
    assert results["moe"].shape == given["x"].shape
    assert ids.shape == weights.shape == given["weights"].shape
    if not tokens:
        return
    np.testing.assert_array_equal(ids[rows].cpu().numpy(), case.want(tokens, "ids"))
    errors = {"topk_weights": error(weights[rows], case.want(tokens, "topk_weights"))}
    assert errors["topk_weights"] <= 1e-5
    for key, got in results.items():
        assert torch.isfinite(got.float()).all(), f"{key}: not every element was written"
        errors[key] = error(got[rows], case.want(tokens, key))
    assert max(errors.values()) <= limit, errors


@pytest.mark.parametrize(("artifact", "name", "schedule"), PAIRS)
@pytest.mark.parametrize("tokens", [7, 257])
def test_twenty_runs_give_the_same_bits(
    folder: Path, artifact: str, name: str, schedule: str, tokens: int
) -> None:
    if not limit_tokens(schedule, tokens):
        return
    case = load(folder, artifact)[name]
    given = case.inputs(tokens)
    first = case.moe(given, schedule).view(torch.uint8).clone()
    for _ in range(19):
        assert torch.equal(first, case.moe(given, schedule).view(torch.uint8))


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
