"""Compile the expert kernels of the benchmark shapes for sm_90a; needs no GPU.

    python bench/build_experts.py OUT [--shapes qwen3,mixtral] [--forms plain,compact,both]
                                      [--variants REGEX] [--wide]

The variants are the schedules that the compiler chooses from. OUT receives one library a shape
and index.json: for every variant its entry symbol, token range and workspace.
bench/gpu_experts.py checks and times them on a GPU machine, where TVM's Python package is not
needed.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tvm

from moec import target
from moec.schedules import backend, choose
from moec.schedules.buffers import Buf, Kernel, PerToken
from moec.schedules.cuda import decode, finish, maps, pipeline, sort, stream, toolchain
from moec.schedules.cuda.decode_config import DecodeConfig, first_config, second_config
from moec.schedules.cuda.host import Launch, build_host
from moec.schedules.cuda.shapes import Matmul
from moec.schedules.linking import link
from moec.spec import ActivationSpec, ExpertsSpec, MoESpec, Renorm, RouterSpec
from moec.target import Form

SMS = 132


@dataclass(frozen=True)
class Shape:
    """E, K, H, I of a layer."""

    E: int
    K: int
    H: int
    I: int


SHAPES = {
    "qwen3": Shape(128, 8, 2048, 768),
    "mixtral": Shape(8, 2, 4096, 14336),
    "dsv3": Shape(256, 8, 7168, 2048),
    "gptoss": Shape(128, 4, 2880, 2880),
    "olmoe": Shape(64, 8, 2048, 1024),
    "tiny": Shape(8, 2, 256, 128),
}


@dataclass(frozen=True)
class Variant:
    """A way to compute the experts: kernels and launches, best in [low, high) tokens.

    `form` is that of the weights that it reads, `held` that of the target.
    """

    name: str
    low: int
    high: int
    launches: tuple[Launch, ...]
    kernels: tuple[Kernel, ...]
    form: Form = Form.PLAIN
    held: Form = Form.PLAIN


def _matmuls(s: Shape, form: Form) -> tuple[Matmul, Matmul]:
    first = Matmul(s.E, s.K, s.H, s.I, True, False, "bfloat16", form)
    return first, Matmul(s.E, s.K, s.I, s.H, False, False, "bfloat16", form)


def decode_variant(
    s: Shape,
    tag: str,
    one: DecodeConfig,
    two: DecodeConfig,
    form: Form = Form.PLAIN,
) -> Variant:
    """Two launches."""
    first, second = _matmuls(s, form)
    a = decode.gate_up(f"{tag}_gu", first, ActivationSpec(), one, SMS)
    b = decode.down(f"{tag}_dn", second, two, SMS, "bfloat16")
    launches = (
        Launch(a, ("x", "topk_ids", "gate_up", "gate_up", "h")),
        Launch(b, ("h", "topk_ids", "topk_weights", "down", "down", "y")),
    )
    return Variant(tag, 1, 9, launches, (a, b), form)


def grouped_variant(
    s: Shape,
    tag: str,
    low: int,
    high: int,
    config: stream.StreamConfig,
    grid: sort.Grid,
    grain: int = 0,
    form: Form = Form.PLAIN,
) -> Variant:
    """Sort, two matmuls, sum."""
    first, second = _matmuls(s, form)
    z = sort.sort(f"{tag}_sort", s.E, s.K, config.rows, grid, grain)
    a = stream.gate_up(f"{tag}_gu", first, ActivationSpec(), config, SMS)
    b = stream.down(f"{tag}_dn", second, config, SMS)
    f = finish.finish(f"{tag}_fin", finish.Finish(s.E, s.K, s.H, "bfloat16", "bfloat16"))
    launches = (
        Launch(z, ("topk_ids", "topk_ids", "order", "offsets", "tiles", "tile_count")),
        Launch(a, ("x", "order", "tiles", "tile_count", "gate_up", "gate_up", "h")),
        Launch(b, ("h", "order", "tiles", "tile_count", "down", "down", "rows")),
        Launch(f, ("rows", "topk_ids", "topk_weights", *["x"] * len(finish.OPTIONAL), "y")),
    )
    return Variant(tag, low, high, launches, (z, a, b, f), form)


def shipped(s: Shape, held: Form) -> list[Variant]:
    """What the compiler chooses for such a layer, each with its token range."""
    one = target.resolve(f"cuda:sm_90a{held.suffix}")
    experts = ExpertsSpec(s.E, s.K, s.H, s.I)
    spec = MoESpec("bfloat16", RouterSpec(s.E, s.K, renorm=Renorm.SUM), experts)
    out = []
    for schedule, tokens in choose(backend("cuda"), (), spec, one):
        if tokens is None or schedule.config.family not in ("decode", "stream"):
            continue
        c, low, high = schedule.config, max(1, tokens.low), tokens.high or 1 << 30
        form, name = c.reads(held), schedule.name
        if held is not Form.PLAIN:
            name += f"_{held.value}"
        if c.family == "decode":
            first, second = first_config(s.H, form), second_config(s.I, s.H, SMS, form)
            variant = decode_variant(s, name, first, second, form)
        else:
            tiles = c.of(form).tiles
            variant = grouped_variant(s, name, low, high, tiles, c.sorted_by, c.grain, form)
        out.append(replace(variant, low=low, high=high, held=held))
    return out


def build(s: Shape, chosen: list[Variant], out: Path, prefixes: str) -> dict[str, Any]:
    """Compile the variants of a shape into one library; returns its index entry."""
    x, y = Buf("x", (PerToken(), s.H), "bfloat16"), Buf("y", (PerToken(), s.H), "bfloat16")
    ids, wts = (
        Buf(n, (PerToken(), s.K), d)
        for n, d in (("topk_ids", "int32"), ("topk_weights", "float32"))
    )
    index: dict[str, Any] = {"shape": [s.E, s.K, s.H, s.I], "library": out.name, "variants": {}}
    functions: dict[str, Any] = {}
    dependent: list[str] = []
    parts = [
        Variant(f"{v.name}_upto{i}", v.low, v.high, v.launches[:i], v.kernels, v.form, v.held)
        for v in chosen if re.search(prefixes, v.name) for i in range(1, len(v.launches))
    ]  # fmt: skip
    for v in (*chosen, *parts):
        first, second = _matmuls(s, v.form)
        entry = build_host(
            f"moec_{v.name}", {"x": x, "topk_ids": ids, "topk_weights": wts},
            {"gate_up": first.weight, "down": second.weight}, {"y": y}, v.launches,
        )  # fmt: skip
        functions[entry.symbol] = entry.func
        functions.update({k.symbol: k.func for k in v.kernels})
        dependent += [k.symbol for k in v.kernels]
        index["variants"][v.name] = {
            "symbol": entry.symbol,
            "tokens": [v.low, v.high],
            "workspace": list(entry.workspace),
            "launches": len(v.launches),
            "form": v.form.value,
            "held": v.held.value,
        }
    with toolchain.compiling("sm_90a") as report:
        library = pipeline.build(tvm.IRModule(functions), "sm_90a", dependent)
        index["resources"] = {k: [r.registers, r.spills] for k, r in sorted(report.items())}
    link(library, target.resolve("cuda"), out, [maps.SOURCE])
    toolchain.assert_cubin(out.read_bytes())
    return index


def main() -> None:
    """Compile what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", default="qwen3")
    parser.add_argument("--variants", default=".")
    parser.add_argument("--forms", default="plain,compact", help="of the weights")
    parser.add_argument("--wide", action="store_true", help="time all at every T, to set ranges")
    parser.add_argument("--prefixes", default="^$", help="regex: also the first 1, 2, ... launches")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "index.json"
    index = json.loads(path.read_text()) if path.exists() else {}
    for name in options.shapes.split(","):
        begin = time.time()
        shape = SHAPES[name]
        made = [v for form in options.forms.split(",") for v in shipped(shape, Form(form))]
        chosen = [v for v in made if re.search(options.variants, v.name)]
        if not chosen:
            parser.error(f"{name} has no variant that matches {options.variants!r}")
        if options.wide:
            chosen = [replace(v, low=1, high=v.high if v.high <= 9 else 1 << 30) for v in chosen]
        index[name] = build(shape, chosen, options.out / f"{name}.so", options.prefixes)
        spilled = [k for k, (_, spills) in index[name]["resources"].items() if spills]
        print(f"{name}: {len(chosen)} variants, {time.time() - begin:.1f} s, spills: {spilled}")
    path.write_text(json.dumps(index, indent=1))


if __name__ == "__main__":
    main()
