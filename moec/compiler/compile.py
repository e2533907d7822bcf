"""compile(): checkpoint -> blocks -> lowered shapes -> libraries -> packed weights -> artifact."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import host, target
from ..artifact import ArtifactWriter
from ..checkpoint import Checkpoint
from ..errors import ResourceError, TargetError, UsageError
from ..frontend import Block, Model, outline
from ..frontend.model import check
from ..schedules import Backend, Chosen, backend, choose
from ..spec import MoESpec
from ..target import Target
from .document import document, weight_file
from .instruments import Observer
from .lower import Lowered, lower
from .options import WEIGHTS, CompileOptions
from .pack import Packing, layout, pack_layer
from .report import Clock, Report


@dataclass(frozen=True)
class Shapes:
    """The distinct blocks of a model: name -> spec, and the shape of every layer."""

    specs: dict[str, MoESpec]
    of_layer: dict[int, str]


@dataclass(frozen=True)
class TargetBuild:
    """One target of the artifact: what its shapes became, and its library."""

    target: Target
    backend: Backend
    schedules: dict[str, Chosen]
    lowered: dict[str, Lowered]
    library: Path | None


def compile(  # the verb of the whole project, so it may hide the builtin here
    checkpoint: str | os.PathLike[str],
    *,
    target: str | Sequence[str] = "cpu",
    out: str | os.PathLike[str],
    layers: Sequence[int] | None = None,
    schedules: Sequence[str] | None = None,
    weights: str = "pack",
    force: bool = False,
    options: CompileOptions | None = None,
) -> Report:
    """Compile the MoE layers of the model directory `checkpoint` into the artifact `out`.

    `target` is one target or several ("cpu" is this machine); packed weights are stored for
    the first. `layers` picks MoE layers by number (default all), `schedules` forces schedules
    by name. `weights` "pack" stores packed weights in the artifact, "reference" leaves them in
    the checkpoint. `force` replaces an existing artifact.

    Raises BadCheckpoint, BadSpec, BadWeights (what was read is wrong), TargetError (target or
    schedule), UsageError (arguments, output), ResourceError (memory, disk). An artifact appears
    whole or not at all.
    """
    options = options or CompileOptions()
    family = None if options.family_file is None else Path(options.family_file)
    if weights not in WEIGHTS:
        raise UsageError(
            f"weights={weights!r} is unknown", where="weights", need=", ".join(WEIGHTS)
        )
    host.check_packages()
    clock, observer = Clock(options.progress), Observer(options)
    targets = _targets(target)
    with _memory(), Checkpoint.open(os.fspath(checkpoint)) as opened:
        with clock("read headers"):
            model = _select(outline(opened, family), layers)
            check(model, opened)
        shapes = _shapes(model.blocks)
        report = Report(str(out), model, shapes.specs, clock, observer, options)
        names = tuple(schedules or ())
        if options.dry_run or options.stop_after in ("graph", "passes", "legalized"):
            for one in targets:
                build = _lower(one, shapes, names, observer, clock, options)
                report.add(one.name, build.schedules)
            return report.finish()
        # Before any work: an output that cannot be written must not cost a compilation.
        with ArtifactWriter(out, force=force) as writer, tempfile.TemporaryDirectory() as folder:
            builds = [
                _build(one, shapes, names, Path(folder), observer, clock, options)
                for one in targets
            ]
            observer.check()  # before anything is written
            for build in builds:
                report.add(build.target.name, build.schedules)
            if options.stops_after("library"):
                return report.finish()
            for build in builds:
                if build.library is not None:
                    writer.add_file(build.target.library, build.library)
            for name, lowered in builds[0].lowered.items():
                writer.add_bytes(f"ir/{name}.py", (lowered.graph.script() + "\n").encode())
            if weights == "pack":
                _pack(writer, opened, model, shapes, builds[0], clock, options)
            with clock("write"):
                digest = writer.finish(document(model, shapes, builds, weights))
            return report.finish(digest)


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    """Turn a failed allocation into ResourceError."""
    try:
        yield
    except MemoryError:
        raise ResourceError(
            "memory ran out while compiling",
            need="memory for the largest parameter of a layer, as it is and packed",
            hint="free memory, compile fewer layers at once, or leave the weights in the "
            "checkpoint (weights='reference')",
        ) from None


def _targets(names: str | Sequence[str]) -> list[Target]:
    texts = [names] if isinstance(names, str) else list(names)
    resolved = {one.name: one for one in map(target.resolve, texts)}
    if not resolved:
        raise UsageError("no target was given", where="target", need="cpu or cpu:NAME")
    return list(resolved.values())


def _select(model: Model, layers: Sequence[int] | None) -> Model:
    """The model with only the chosen layers; UsageError for one that is no MoE layer."""
    if layers is None:
        return model
    blocks = {block.layer: block for block in model.blocks}
    for layer in layers:
        if layer not in blocks:
            held = ", ".join(map(str, sorted(blocks)))
            raise UsageError(
                f"layer {layer} is not an MoE layer of this checkpoint", where="layers", need=held
            )
    return replace(model, blocks=tuple(blocks[n] for n in sorted(set(layers))))


def _shapes(blocks: Sequence[Block]) -> Shapes:
    names: dict[MoESpec, str] = {}
    for block in blocks:
        names.setdefault(block.spec, f"b{len(names)}")
    return Shapes({n: s for s, n in names.items()}, {b.layer: names[b.spec] for b in blocks})


def _lower(
    one: Target,
    shapes: Shapes,
    names: tuple[str, ...],
    observer: Observer,
    clock: Clock,
    options: CompileOptions,
) -> TargetBuild:
    own, lowered = backend(one.kind), {}
    chosen = {name: choose(own, names, spec, one) for name, spec in shapes.specs.items()}
    for name, spec in shapes.specs.items():
        if options.dry_run:
            break
        with clock("lower", f"{name} for {one.name}"):
            lowered[name] = lower(name, spec, one, own, chosen[name], observer, options.stop_after)
    return TargetBuild(one, own, chosen, lowered, None)


def _build(
    one: Target,
    shapes: Shapes,
    names: tuple[str, ...],
    folder: Path,
    observer: Observer,
    clock: Clock,
    options: CompileOptions,
) -> TargetBuild:
    build = _lower(one, shapes, names, observer, clock, options)
    library = folder / Path(one.library).name
    functions: dict[str, Any] = {}
    for lowered in build.lowered.values():
        functions.update(lowered.functions)
    with clock("generate code", one.name), observer.passes(one.name):
        build.backend.build(functions, one, library)
    return replace(build, library=library)


def _pack(
    writer: ArtifactWriter,
    opened: Checkpoint,
    model: Model,
    shapes: Shapes,
    build: TargetBuild,
    clock: Clock,
    options: CompileOptions,
) -> None:
    packing = Packing(build, shapes.specs)
    for done, block in enumerate(model.blocks, 1):
        packed = build.lowered[shapes.of_layer[block.layer]].packed
        with clock("pack", f"layer {block.layer}, {done} of {len(model.blocks)}"):
            with writer.tensors(weight_file(block.layer), layout(packed)) as out:
                try:
                    pack_layer(opened, block.plan, packed, packing, out, options.allow_nonfinite)
                except TargetError as error:
                    where = f"layer {block.layer}, {error.where}"
                    raise TargetError(error.message, where=where, hint=error.hint) from None
            opened.release()
