"""Compile the cases and compute what they must give: `python -m tests.gpu.make DIR`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from moec.spec import MoESpec
from tests.blocks import Small, build, random_parameters

from . import cases, families
from .data import ROUTINGS, digest, inputs, sample

Array = np.ndarray[Any, Any]


def expected(small: Small, tokens: int) -> dict[str, Array]:
    """The float64 results of a case: ids and weights of the router, moe, experts by routing."""
    from moec.ops import reference

    given, rows = inputs(small.spec, tokens), sample(tokens)
    own = {name: array[rows] for name, array in given.items()}
    more = {"token_ids": own["token_ids"]}
    out: dict[str, Array] = {"digest": np.array(digest(given))}
    ids, weights = reference.route(small.spec, small.parameters, own["x"], **more)
    out["ids"], out["topk_weights"] = ids, weights
    y = reference.moe(small.spec, small.parameters, own["x"], shared_x=own["shared_x"], **more)
    out["moe"] = y.astype(np.float32)
    for name in ROUTINGS:
        y = reference.experts(small.spec, small.parameters, own["x"], own[name], own["weights"])
        out[name] = y.astype(np.float32)
    return out


def uneven(spec: MoESpec) -> dict[str, Array]:
    """Parameters some of whose weights are tiny, zero, or large."""
    made = random_parameters(spec)
    made["gate_up"][:, 3, 5:45] *= 2.0**-60
    made["gate_up"][:, -2, 100:107] *= 2.0**20
    made["down"][:, 9, ::16] = 0.0
    made["down"][::2, 64:128, 77] *= 2.0**-100
    return made


def make(out: Path) -> None:
    """Write an artifact for each target, and the expected results of its layers."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (target, table) in cases.ARTIFACTS.items():
        blocks = [
            Small(spec, schedules, parameters=uneven(spec) if own == cases.UNEVEN else {})
            for own, (spec, schedules) in table.items()
        ]
        made = build(blocks, out / f"{name}.moec", target)
        results = {
            f"{n}/{tokens}/{key}": value
            for n, small in enumerate(made)
            for tokens in cases.TOKENS
            if tokens
            for key, value in expected(small, tokens).items()
        }
        np.savez_compressed(out / f"{name}.npz", **results)
        (out / f"{name}.json").write_text(json.dumps(list(table)))
        print(f"{name}: {len(made)} blocks for {target}", flush=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
    families.make(Path(sys.argv[1]) / "families")
