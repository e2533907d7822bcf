"""Every family's tiny checkpoint compiled for a GPU, and what the oracles of tests/families say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

TARGET, SCHEDULES, VARIANT = "cuda:sm_90a", ("plain", "loop"), "a"
TOKENS = (1, 33)
TOLERANCE = 1e-5  # that of tests/families
Array = np.ndarray[Any, Any]


def make(out: Path) -> int:
    """One folder a family: its artifact, inputs and results of its first and last MoE layer."""
    import moec
    from tests.families import oracle, published, table, tiny

    for family in (*table.FAMILIES, *published.FAMILIES):
        place = out / family
        if (place / "expected.npz").exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        if family in published.FAMILIES:
            layers, hidden, run = published.write(family, VARIANT, place / "model")
        else:
            model = tiny.tiny(family, VARIANT, place / "model")
            layers, hidden = oracle.moe_layers(model), table.COMMON[VARIANT]["hidden_size"]

            def run(layer: int, x: Array, ids: Array, _: Array, model: Any = model) -> Any:
                return oracle.run(model, layer, x, ids)

        moec.compile(place / "model", target=TARGET, out=place / "m.moec", schedules=SCHEDULES)
        held: dict[str, Array] = {}
        for layer in sorted({layers[0], layers[-1]}):
            for tokens in TOKENS:
                random = np.random.default_rng(tokens * 100 + layer)
                x, shared_x = random.normal(size=(2, tokens, hidden)).astype(np.float32)
                token_ids = random.integers(0, 50, tokens).astype(np.int64)
                y, ids, weights = run(layer, x, token_ids, shared_x)
                values = {"x": x, "shared_x": shared_x, "token_ids": token_ids, "y": y,
                          "ids": ids, "topk_weights": weights}  # fmt: skip
                held |= {f"{layer}/{tokens}/{name}": array for name, array in values.items()}
        for file in (place / "model").iterdir():
            file.unlink()
        (place / "model").rmdir()
        np.savez_compressed(place / "expected.npz", **held)
        print(family, flush=True)
    return len(table.FAMILIES) + len(published.FAMILIES)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
