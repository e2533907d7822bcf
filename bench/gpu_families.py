"""Whole artifacts on a GPU against transformers' modules: nine families in bfloat16 and float32.

tests/gpu has all families in float32, and every schedule against float64; this has the modules'
own bfloat16 beside ours.

    python bench/gpu_families.py make OUT      # here: tiny models, artifacts, expected results
    python bench/gpu_families.py run OUT       # on the GPU machine: needs torch, no compiler

The criteria are those of tests/compiler/test_families.py: given ids, 2^-8 in the norm for
bfloat16 (float32: 1e-5) against the float32 modules; for the whole block at most that much
more than the error of the bfloat16 module.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TOKENS = (0, 1, 2, 7, 33, 257)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-10}
TENSOR = (
    "gather", "stream16", "stream64", "stream160", "mma16", "mma64", "simple", "loop",
)  # fmt: skip
# Variant "c": sizes that the two-launch schedule takes, which the tiny variants are too odd for.
_WIDE = {"hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 192}
WIDE = ("qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3")


def make(out: Path, only: str) -> None:
    """Compile for sm_90a and save what transformers computes, one folder a case."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import moec
    from moec.errors import TargetError
    from tests import models

    out.mkdir(parents=True, exist_ok=True)
    for family in WIDE:
        sizes = models.FAMILIES[family][2]
        known = sizes["a"]
        sizes["c"] = {**known, **{k: v for k, v in _WIDE.items() if k in known}}
    for variant in ("c", *models.VARIANTS):
        for family in WIDE if variant == "c" else models.FAMILIES:
            for dtype in ("bfloat16", "float32"):
                case = f"{family}-{variant}-{dtype}"
                if only not in case or (out / case / "expected.npz").exists():
                    continue
                (out / case).mkdir(exist_ok=True)
                begin = time.time()
                with tempfile.TemporaryDirectory() as folder:
                    model = models.tiny(family, variant, dtype, Path(folder))
                    names = ("simple", "loop") if dtype == "float32" else TENSOR
                    while True:
                        try:
                            moec.compile(folder, target="cuda:sm_90a", out=out / case / "m.moec",
                                         schedules=names, force=True)  # fmt: skip
                            break
                        except TargetError as error:
                            if "refuses" not in error.message:
                                raise
                            print("  ", error.message)
                            refused = error.message.split("'")[1]
                            names = tuple(n for n in names if n != refused)
                    twin = model if dtype == "float32" else models.widened(model)
                    np.savez(out / case / "expected.npz", **expected(models, model, twin, dtype))
                print(f"{case}: {', '.join(names)}; {time.time() - begin:.0f} s", flush=True)


def expected(models: Any, model: Any, twin: Any, dtype: str) -> dict[str, Any]:
    """Inputs and the modules' results of the first MoE layer."""
    import ml_dtypes

    layer = models.moe_layers(model)[0]
    kind = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype]
    random = np.random.default_rng(5)
    out: dict[str, Any] = {"layer": layer}
    for t in TOKENS:
        x = random.normal(size=(t, model.config.hidden_size)).astype(kind)
        out[f"x{t}"] = x.view(np.uint16) if dtype == "bfloat16" else x
        ids, weights = models.reference_route(model, layer, x)
        out[f"ids{t}"], out[f"weights{t}"] = ids, weights
        out[f"theirs{t}"] = models.reference_moe(model, layer, x)
        out[f"exact{t}"] = models.reference_moe(twin, layer, x)
        count, k = models._feed_forward(model, layer).experts.num_experts, ids.shape[1]
        given = random.normal(size=(t, k)).astype(np.float32)
        out[f"given{t}"] = given
        for name, low, high in (("random", 0, count), ("two", 0, 2), ("outside", -3, count + 3)):
            chosen = random.integers(low, high, (t, k)).astype(np.int32)
            out[f"{name}{t}"] = chosen
            out[f"{name}_y{t}"] = models.reference_experts(twin, layer, x, chosen, given)
    return out


def error(got: Any, want: Any) -> float:
    """|got - want| / |want| in float64; NaN never passes a comparison."""
    difference = np.linalg.norm(got.astype(np.float64) - want.astype(np.float64))
    norm = np.linalg.norm(want.astype(np.float64))
    return float(difference / norm) if norm else float(difference)


def run(out: Path, only: str) -> int:
    """Check every case on cuda:0; returns how many failed."""
    import torch

    import moec

    failed = 0
    for folder in sorted(p for p in out.iterdir() if (p / "expected.npz").exists()):
        if only not in folder.name:
            continue
        try:
            notes = check(torch, moec, folder)
        except Exception as problem:  # one broken case must not hide the others
            notes = [f"{type(problem).__name__}: {problem}"]
        failed += bool(notes)
        print(f"{folder.name}: {'; '.join(notes[:4]) or 'ok'}", flush=True)
    print(f"{failed} cases failed")
    return failed


def check(torch: Any, moec: Any, folder: Path) -> list[str]:
    """What is wrong with one case."""
    dtype = folder.name.rsplit("-", 1)[1]
    limit, data = TOLERANCE[dtype], np.load(folder / "expected.npz")
    model = moec.load(folder / "m.moec", device="cuda:0")
    block = model[int(data["layer"])]
    notes: list[str] = []

    def note(ok: bool, text: str) -> None:
        if not ok:
            notes.append(text)

    for t in TOKENS:
        raw = torch.from_numpy(data[f"x{t}"]).cuda()
        x = raw.view(torch.bfloat16) if dtype == "bfloat16" else raw
        exact, theirs = data[f"exact{t}"], data[f"theirs{t}"]
        want_ids = np.sort(data[f"ids{t}"], axis=1)
        for schedule in block.schedules():
            if schedule == "gather" and t > 8:
                continue
            where = f"T={t} {schedule}"
            ids, _ = block.route(x, schedule=schedule)
            same = (np.sort(ids.cpu().numpy(), axis=1) == want_ids).all(axis=1)
            # Logits that are equal after rounding to bfloat16: torch may take either, here the
            # lowest id wins. About one token in 40 has such a tie at the edge of its choice.
            ties = 0 if dtype == "float32" else max(1, t // 20)
            note((~same).sum() <= ties, f"{where}: ids differ")
            y = block(x, schedule=schedule).float().cpu().numpy()
            again = block(x, schedule=schedule).float().cpu().numpy()
            note(np.array_equal(y, again), f"{where}: not repeatable")
            allowed = error(theirs[same], exact[same]) + limit
            got = error(y[same], exact[same])
            note(got <= allowed, f"{where}: moe {got:.1e} of {allowed:.1e}")
            given = torch.from_numpy(data[f"given{t}"]).cuda()
            for name in ("random", "two", "outside"):
                chosen = torch.from_numpy(data[f"{name}{t}"]).cuda()
                y = block.experts(x, chosen, given, schedule=schedule).float().cpu().numpy()
                got = error(y, data[f"{name}_y{t}"])
                note(got <= limit, f"{where}: experts {name} {got:.1e}")
    notes += _graph(torch, block, dtype)
    return notes


def _graph(torch: Any, block: Any, dtype: str) -> list[str]:
    """A captured call gives what a call gives, on new inputs in the same memory."""
    x = torch.randn(5, block.spec.experts.hidden_size, device="cuda")
    x = x.to(getattr(torch, dtype))
    out = torch.empty_like(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        block(x, out=out)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            block(x, out=out)
    x.copy_(torch.randn(x.shape, device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    return [] if torch.equal(out, block(x)) else ["a replayed graph differs from a call"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("make", "run"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    if options.verb == "make":
        make(options.out, options.only)
    else:
        sys.exit(5 if run(options.out, options.only) else 0)


if __name__ == "__main__":
    main()
