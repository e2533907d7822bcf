"""Blocks without a checkpoint: random parameters for any spec, many specs in a few artifacts.

Codegen is the slow part of these tests: a module builds all its blocks at once, on all cores.
What compiles, packs, writes and loads them is the real thing; only the reading of files and
the families are left out.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

import moec
from moec import host
from moec import target as targets
from moec.artifact import ArtifactWriter
from moec.checkpoint import Checkpoint
from moec.compiler.compile import Shapes, TargetBuild
from moec.compiler.document import document, weight_file
from moec.compiler.instruments import Observer
from moec.compiler.lower import lower
from moec.compiler.options import CompileOptions
from moec.compiler.pack import Packing, layout, pack_layer
from moec.frontend import Block, Model
from moec.schedules import backend, choose
from moec.spec import MoESpec
from moec.weights import WeightPlan

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SCHEDULES = ("fused", "gather", "loop")

Array = np.ndarray[Any, Any]
Parameters = Mapping[str, Array]


@dataclass(frozen=True)
class InMemory:
    """Stands for a weight plan: the tensors of one layer are at hand."""

    parameters: Parameters

    def tensor(self, _: Checkpoint | None, name: str, *, allow_nonfinite: bool) -> Array:
        return self.parameters[name]

    def expert(self, _: Checkpoint | None, name: str, e: int, *, allow_nonfinite: bool) -> Array:
        return self.parameters[name][e]

    def to_json(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Small:
    """A spec with its canonical parameters, compiled with `schedules`."""

    spec: MoESpec
    schedules: tuple[str, ...] = SCHEDULES
    seed: int = 0
    parameters: Parameters = field(default_factory=dict)


def random_parameters(spec: MoESpec, seed: int = 0) -> dict[str, Array]:
    """Canonical parameters whose products are of the order of 1, in the dtypes of the spec."""
    random = np.random.default_rng(seed)
    out = {}
    for name, parameter in spec.parameters().items():
        if name == "token_table":
            rows = [random.permutation(spec.router.num_experts) for _ in range(parameter.shape[0])]
            out[name] = np.stack(rows)[:, : spec.router.top_k].astype(np.int32)
            continue
        values = random.standard_normal(parameter.shape)
        if name.startswith("norm") or name == "per_expert_scale":
            values = 1.0 + 0.3 * values
        elif parameter.dtype == "float32" and len(parameter.shape) <= 2 and "bias" in name:
            values = 0.5 * values
        else:
            values = values / np.sqrt(parameter.shape[-1])
        out[name] = values.astype(DTYPES[parameter.dtype])
    return out


def build(blocks: Sequence[Small], out: Path, target: str = "cpu") -> list[Small]:
    """Write the artifact `out`, whose layer n is blocks[n]; the blocks with their parameters."""
    one = targets.resolve(target)
    own = backend(one.kind)
    whole = [
        Small(b.spec, b.schedules, b.seed, b.parameters or random_parameters(b.spec, b.seed))
        for b in blocks
    ]
    lowered, schedules = {}, {}
    for n, small in enumerate(whole):
        chosen = choose(own, small.schedules, small.spec, one)
        schedules[f"b{n}"] = chosen
        observer = Observer(CompileOptions())
        lowered[f"b{n}"] = lower(f"b{n}", small.spec, one, own, chosen, observer, None)
    functions = {s: f for made in lowered.values() for s, f in made.functions.items()}
    shapes = Shapes(
        {f"b{n}": s.spec for n, s in enumerate(whole)}, {n: f"b{n}" for n in range(len(whole))}
    )
    plans = [cast(WeightPlan, InMemory(small.parameters)) for small in whole]
    model = Model(
        path=out, family="none", model_type="none", dtype="float32", prefix="",
        num_layers=len(whole), dense_layers=(), source={},
        blocks=tuple(Block(n, s.spec, plans[n], "none") for n, s in enumerate(whole)),
    )  # fmt: skip
    build = TargetBuild(one, own, schedules, lowered, None)
    packing = Packing(build, shapes.specs)
    nothing = cast(Checkpoint, None)
    with tempfile.TemporaryDirectory() as folder, ArtifactWriter(out) as writer:
        library = Path(folder) / "lib.so"
        own.build(functions, one, library)
        writer.add_file(f"lib/{one.name}.so", library)
        for n, plan in enumerate(plans):
            packed = lowered[f"b{n}"].packed
            with writer.tensors(weight_file(n), layout(packed)) as file:
                pack_layer(nothing, plan, packed, packing, file, False)
        writer.finish(document(model, shapes, [build], "pack"))
    return whole


@dataclass(frozen=True)
class Built:
    """Blocks as they were asked for, and the artifacts that hold them.

    Block n is layer n // len(paths) of artifact n % len(paths).
    """

    blocks: list[Small]
    paths: tuple[Path, ...]
    models: list[moec.Model]
    loaded: list[moec.Block]

    def load(self, **options: Any) -> list[moec.Block]:
        """The blocks, loaded once more with other options."""
        return _blocks([moec.load(path, **options) for path in self.paths], len(self.blocks))


def _blocks(models: Sequence[moec.Model], count: int) -> list[moec.Block]:
    return [models[n % len(models)][n // len(models)] for n in range(count)]


def built(blocks: Sequence[Small], folder: Path, target: str = "cpu", *, parts: int = 1) -> Built:
    """Build the blocks and load what was built; several `parts` are built side by side."""
    paths = tuple(folder / f"{target.replace(':', '-')}-{n}.moec" for n in range(parts))
    jobs = [(blocks[n::parts], path, target) for n, path in enumerate(paths)]
    if parts == 1:
        made = [build(*job) for job in jobs]
    else:
        # Fresh processes: a forked one would share TVM's threads.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(parts, host.cores()), mp_context=spawn) as pool:
            made = list(pool.map(build, *zip(*jobs, strict=True)))
    whole = [made[n % parts][n // parts] for n in range(len(blocks))]
    models = [moec.load(path, threads=1) for path in paths]
    return Built(whole, paths, models, _blocks(models, len(whole)))


def inputs(spec: MoESpec, tokens: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """x [T, H] in the model's dtype, ids [T, K] (repeated ones too), weights [T, K]."""
    random = np.random.default_rng(seed)
    e = spec.experts
    x = random.standard_normal((tokens, e.hidden_size)).astype(DTYPES[spec.dtype])
    ids = random.integers(0, e.num_experts, (tokens, e.top_k)).astype(np.int32)
    weights = random.uniform(-1.0, 1.0, (tokens, e.top_k)).astype(np.float32)
    return x, ids, weights


def error(got: Array, want: Array) -> float:
    """|got - want| / |want| in float64; NaN never passes a comparison."""
    difference = np.linalg.norm(got.astype(np.float64) - want.astype(np.float64))
    norm = np.linalg.norm(want.astype(np.float64))
    return float(difference / norm) if norm else float(difference)


def bits(array: Array) -> Array:
    """An array as unsigned integers, for comparisons to the last bit."""
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)
