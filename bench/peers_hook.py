"""moec as a contender of a side-by-side harness: build(ctx) -> f(r), see bench/gpu_experts.py.

MOEC_LIBS names the folder that build_experts.py filled: the variant in whose range T is answers,
as in a compiled artifact; MOEC_FORM is that of the weights that a target holds (plain). MOEC_SITE:
folders with the pinned tvm and tvm_ffi, if apart.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_experts
from compact_weights import pack

NOTE = "moec"
_loaded: dict[str, Any] = {}


def build(ctx: Any) -> Any:
    """A function of the routing number; plain weights are used where they are, unpacked."""
    import torch

    # The harness may bring another tvm_ffi: the pinned one must come first.
    sys.path[:0] = os.environ.get("MOEC_SITE", "").split(os.pathsep)
    libs = Path(os.environ["MOEC_LIBS"])
    index = json.loads((libs / "index.json").read_text())
    name = next(n for n, i in index.items() if i["shape"] == [ctx.E, ctx.k, ctx.h, ctx.i])
    form = os.environ.get("MOEC_FORM", "plain")
    variants = [v for v in index[name]["variants"].values() if v["held"] == form]
    info = next(v for v in variants if v["tokens"][0] <= ctx.T < v["tokens"][1])
    weights = [ctx.w13, ctx.w2]
    if info["form"] == "compact":
        if not hasattr(ctx, "compact"):
            ctx.compact = [pack(torch, ctx.w13, True), pack(torch, ctx.w2, False)]
        weights = ctx.compact
    if name not in _loaded:
        _loaded[name] = gpu_experts.Entries(libs / index[name]["library"])
    fixed, per_token = info["workspace"]
    space = torch.empty(fixed + per_token * ctx.T + 256, device=ctx.dev, dtype=torch.uint8)
    out = torch.empty(ctx.T, ctx.h, device=ctx.dev, dtype=torch.bfloat16)
    calls = [
        _loaded[name].bind(info["symbol"], [ctx.x, ctx.ids[r], ctx.wts[r], *weights, out, space])
        for r in range(ctx.R)
    ]

    def f(r: int) -> Any:
        calls[r]()
        return out

    return f
