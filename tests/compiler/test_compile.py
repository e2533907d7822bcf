"""moec.compile: options, layers, schedules, weights, targets, outputs, and what it refuses.

The command line's view of the same (report, exit codes) is in tests/cli/test_compile.py.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tvm.script import from_source

import moec
from moec import host, ops, target
from moec.artifact import Artifact
from moec.compiler import STAGES
from moec.compiler import pack as packing
from moec.compiler.instruments import Observer
from moec.compiler.lower import lower
from moec.errors import BadWeights, ResourceError, TargetError, UsageError
from moec.schedules import backend, choose, linking
from moec.schedules.cpu import codegen
from moec.spec import ExpertsSpec, MoESpec, RouterSpec
from tests import tiny

X86 = host.host().arch == "x86_64"
PIPELINE = importlib.import_module("moec.compiler.compile")  # the name is the function's
PASSES = ("moec.FoldGather", "moec.FoldActivation", "moec.FoldReduce")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixtral with layers 0 and 1."""
    folder = tmp_path_factory.mktemp("made") / "tiny"
    tiny.write(folder)
    return folder


@pytest.fixture(scope="module")
def packed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint compiled for decode, weights in the artifact."""
    out = tmp_path_factory.mktemp("packed") / "a.moec"
    moec.compile(checkpoint, out=out, schedules=["gather"])
    return out


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where to write; only an artifact under its own name may be left in the folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    yield folder / "a.moec"
    assert {p.name for p in folder.iterdir()} <= {"a.moec"}


def outputs(model: moec.Model, layer: int) -> list[np.ndarray[Any, Any]]:
    x = tiny.inputs(5)
    ids, weights = model[layer].route(x)
    return [model[layer](x), ids, weights, model[layer].experts(x, ids, weights)]


def test_dumps_of_the_graph_parse(checkpoint: Path, out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "ir"
    options = moec.CompileOptions(dump_ir=folder, stop_after="legalized")
    report = moec.compile(checkpoint, out=out, schedules=["fused", "loop"], options=options)
    names = [p.name for p in sorted(folder.iterdir())]
    steps = ["graph", *(f"fused-{p}" for p in (*PASSES, "LegalizeOps"))]
    steps += [f"loop-{p}" for p in (*PASSES, "moec.LoopExperts", "LegalizeOps")]
    assert names == [f"{n:03d}-b0-{step}.py" for n, step in enumerate(steps)]
    ops.register()
    for name in names:
        module = from_source((folder / name).read_text())
        assert {v.name_hint for v in module.functions} == {"route", "experts", "moe"}
    assert not out.exists() and report.digest is None


def test_a_dump_that_cannot_be_written(checkpoint: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write") as caught:
        options = moec.CompileOptions(dump_ir=tmp_path / "file" / "ir")
        moec.compile(checkpoint, out=out, options=options)
    assert "file/ir" in str(caught.value)


@pytest.mark.parametrize("name", [*PASSES, "LegalizeOps", "graph"])
def test_ir_after_a_pass(checkpoint: Path, out: Path, name: str) -> None:
    options = moec.CompileOptions(print_ir_after=name, stop_after="passes")
    if name == "LegalizeOps":
        options = replace(options, stop_after="legalized")
    ir = moec.compile(checkpoint, out=out, schedules=["fused"], options=options).ir
    wanted = [text for text in ir if f" after {name}\n" in text]
    assert len(wanted) == 1 and "@R.function" in wanted[0]
    assert ("R.moec.gather_rows" in wanted[0]) == (name == "graph")


def test_an_unknown_pass_lists_those_that_ran(checkpoint: Path, out: Path) -> None:
    options = moec.CompileOptions(print_ir_after="moec.Nothing", stop_after="passes")
    with pytest.raises(UsageError, match=r"no pass 'moec\.Nothing' ran") as caught:
        moec.compile(checkpoint, out=out, schedules=["fused"], options=options)
    assert caught.value.need == "one of " + ", ".join(PASSES)
    assert caught.value.where == "print_ir_after" and not out.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_stopping_after_a_stage(checkpoint: Path, out: Path, stage: str) -> None:
    said: list[str] = []
    options = moec.CompileOptions(stop_after=stage, progress=said.append)
    report = moec.compile(checkpoint, out=out, schedules=["gather"], layers=[0], options=options)
    assert report.digest is None and not out.exists()
    marks = {"graph": "R.moec.gather_rows", "passes": "R.moec.indexed_matmul",
             "legalized": "R.call_dps_packed"}  # fmt: skip
    assert len(report.ir) == (stage in marks)
    assert all(marks[stage] in text for text in report.ir)
    assert ("generate code" in report.seconds) == (stage == "library")
    assert "pack" not in report.seconds and "write" not in report.seconds
    assert any(line.startswith("lower: b0") for line in said)


def test_options_that_make_no_sense(checkpoint: Path, out: Path) -> None:
    with pytest.raises(UsageError, match="there is no stage 'link'") as caught:
        moec.CompileOptions(stop_after="link")
    assert caught.value.need == ", ".join(STAGES)
    for changes, message in (
        ({"weights": "none"}, "weights='none' is unknown"),
        ({"target": []}, "no target was given"),
        ({"layers": [0, 7]}, "layer 7 is not an MoE layer"),
    ):
        with pytest.raises(UsageError, match=message):
            moec.compile(checkpoint, **{"out": out, **changes})
    for name in ("cpu:abacus", "tpu", "cuda:sm_1"):
        with pytest.raises(TargetError, match=name.split(":")[-1]):
            moec.compile(checkpoint, out=out, target=name)


def test_times_of_passes(checkpoint: Path, out: Path) -> None:
    run = {"schedules": ["fused"], "out": out}
    quiet = moec.CompileOptions(stop_after="legalized")
    assert moec.compile(checkpoint, options=quiet, **run).pass_seconds == {}
    report = moec.compile(checkpoint, options=replace(quiet, time_passes=True), **run)
    assert {*PASSES, "LegalizeOps"} <= report.pass_seconds.keys()
    assert all(seconds >= 0 for seconds in report.pass_seconds.values())
    assert json.loads(json.dumps(report.to_json()))["pass_seconds"] == report.pass_seconds


def test_a_dry_run_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    options = moec.CompileOptions(dry_run=True)
    report = moec.compile(checkpoint, out=tmp_path / "no" / "folder.moec", options=options)
    assert report.digest is None and sorted(p.name for p in tmp_path.iterdir()) == before
    with pytest.raises(TargetError, match="has no schedule 'magic'"):
        moec.compile(checkpoint, out=tmp_path / "a", schedules=["magic"], options=options)


def test_layers(checkpoint: Path, packed: Path, out: Path) -> None:
    assert list(moec.load(packed)) == [0, 1]
    moec.compile(checkpoint, out=out, schedules=["gather"], layers=[1, 1])
    one = moec.load(out)
    assert list(one) == [1]
    for got, want in zip(outputs(one, 1), outputs(moec.load(packed), 1), strict=True):
        np.testing.assert_array_equal(got, want)


def test_forced_schedules(packed: Path, checkpoint: Path, out: Path) -> None:
    model = moec.load(packed)
    assert model[0].schedules() == ("gather",)
    x = tiny.inputs(300)  # outside of the range in which gather is chosen by default
    np.testing.assert_array_equal(model[0](x), model[0](x, schedule="gather"))
    with pytest.raises(TargetError, match="not compiled with schedule 'fused'") as caught:
        model[0](x, schedule="fused")
    assert caught.value.need == "one of gather"
    with pytest.raises(TargetError, match="has no schedule 'magic'") as caught:
        moec.compile(checkpoint, out=out, schedules=["fused", "magic"])
    assert caught.value.need == "one of fused, gather, loop" and not out.exists()


def test_a_schedule_that_refuses_is_never_replaced(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, out: Path
) -> None:
    cpu = backend("cpu")
    picky = replace(cpu.schedules["fused"], supports=lambda spec, target: "E is not prime")
    only = replace(cpu, schedules={**cpu.schedules, "fused": picky})
    monkeypatch.setattr(PIPELINE, "backend", lambda kind: only)
    with pytest.raises(TargetError, match="'fused' refuses this block: E is not prime"):
        moec.compile(checkpoint, out=out, schedules=["fused"])
    report = moec.compile(checkpoint, out=out, options=moec.CompileOptions(dry_run=True))
    (chosen,) = report.targets.values()
    assert chosen == {"b0": {"gather": "any T"}}  # by default, those that fit cover every T
    nobody = {n: replace(s, supports=picky.supports) for n, s in cpu.schedules.items()}
    monkeypatch.setattr(PIPELINE, "backend", lambda kind: replace(cpu, schedules=nobody))
    with pytest.raises(TargetError, match=r"no schedule of .* computes this block") as caught:
        moec.compile(checkpoint, out=out)
    assert "loop: E is not prime" in str(caught.value)


def test_weights_by_reference_give_the_same_bits(checkpoint: Path, packed: Path, out: Path) -> None:
    moec.compile(checkpoint, out=out, schedules=["gather"], weights="reference")
    assert not list(out.rglob("*.safetensors"))
    with pytest.raises(UsageError, match="they stay in the checkpoint"):
        moec.load(out)
    referring, whole = moec.load(out, checkpoint=checkpoint), moec.load(packed)
    for layer in (0, 1):
        pairs = zip(outputs(referring, layer), outputs(whole, layer), strict=True)
        for got, want in pairs:
            np.testing.assert_array_equal(got, want)


@pytest.mark.skipif(not X86, reason="two targets that run here exist on x86-64 only")
def test_several_targets_in_one_artifact(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, out: Path
) -> None:
    names = ("cpu:x86-64-v3", "cpu:x86-64")
    moec.compile(checkpoint, target=names, out=out, schedules=["gather"], layers=[0])
    assert sorted(p.name for p in (out / "lib").iterdir()) == [
        "cpu-x86-64-v3.so", "cpu-x86-64.so"
    ]  # fmt: skip
    here = host.host()
    want = tiny.moe(tiny.write(out.parents[1] / "again"), 0, tiny.inputs(5))
    machines = {"cpu-x86-64": here.features - {"avx2"}}
    if "avx2" in here.features:
        machines["cpu-x86-64-v3"] = here.features
    for name, features in machines.items():
        machine = replace(here, features=frozenset(features))
        monkeypatch.setattr(host, "host", lambda machine=machine: machine)
        # Weights are packed for the first target; the other one packs from the checkpoint.
        model = moec.load(out, checkpoint=checkpoint)
        assert model.target == name
        # 1e-5 of values near 1: float32 sums of some twenty products.
        np.testing.assert_allclose(model[0](tiny.inputs(5)), want, atol=1e-5)


SPEC = MoESpec("bfloat16", RouterSpec(4, 2), ExpertsSpec(4, 2, 64, 48))


def assembly(name: str, schedule: str) -> str:
    """What the block becomes for a target that need not run here."""
    one, own = target.resolve(name), backend("cpu")
    chosen = choose(own, (schedule,), SPEC, one)
    lowered = lower("b0", SPEC, one, own, chosen, Observer(moec.CompileOptions()), None)
    return str(codegen.compile_module(lowered.functions, one).inspect_source("asm"))


@pytest.mark.parametrize(
    ("name", "has", "lacks"),
    [
        ("cpu:znver4", ("zmm", "vdpbf16ps", "vcvtneps2bf16"), ()),
        ("cpu:x86-64-v4", ("zmm", "vfmadd"), ("vdpbf16ps", "vcvtneps2bf16")),
        ("cpu:x86-64-v3", ("ymm", "vfmadd"), ("zmm", "vdpbf16ps")),
        ("cpu:x86-64", ("xmm", "mulps"), ("ymm", "zmm", "vfmadd", "vmulps")),
        ("cpu:aarch64", ("fmla",), ("xmm", "bfdot", "whilelo")),
        ("cpu:neoverse-v1", ("bfdot", "bfcvtn", "fmla"), ("whilelo", "bfmmla")),
    ],
)
def test_the_code_keeps_to_its_instruction_set(
    name: str, has: tuple[str, ...], lacks: tuple[str, ...]
) -> None:
    text = assembly(name, "gather")
    assert [word for word in has if word not in text] == []
    assert [word for word in lacks if word in text] == []


@pytest.mark.parametrize("schedule", ["fused", "gather"])
@pytest.mark.parametrize(("name", "asks"), [("cpu:x86-64-v4", True), ("cpu:x86-64-v3", False)])
def test_weights_that_follow_are_asked_for(name: str, asks: bool, schedule: str) -> None:
    assert ("prefetcht1" in assembly(name, schedule)) == asks


@pytest.mark.skipif(not X86, reason="links for x86-64")
def test_a_target_that_may_not_run_here(checkpoint: Path, out: Path) -> None:
    moec.compile(checkpoint, target="cpu:znver4", out=out, schedules=["gather"], layers=[0])
    requires = Artifact.open(out).manifest.targets["cpu-znver4"].requires
    assert {"avx512f", "avx512_bf16"} <= set(requires["features"])
    reason = host.missing(requires)
    if reason is None:
        assert moec.load(out).target == "cpu-znver4"
        return
    with pytest.raises(TargetError, match="this machine cannot run the artifact") as caught:
        moec.load(out)
    assert "avx512" in str(caught.value) and "cpu:x86-64-v3" in str(caught.value)


def test_a_missing_linker_is_named(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, out: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    foreign = "cpu:aarch64" if X86 else "cpu:x86-64"
    with pytest.raises(TargetError, match="no linker for cpu-") as caught:
        moec.compile(checkpoint, target=foreign, out=out)
    assert caught.value.need == linking._CROSS[target.resolve(foreign).arch]
    assert "Debian package gcc-" in str(caught.value) and not out.exists()
    with pytest.raises(TargetError, match="no linker") as caught:
        moec.compile(checkpoint, out=out)
    assert caught.value.need == "cc or gcc or clang"


def test_a_linker_that_fails(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, out: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no space for ld >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match=r"linking for .* failed") as caught:
        moec.compile(checkpoint, out=out, schedules=["gather"], layers=[0])
    assert "no space for ld" in caught.value.message and not out.exists()


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("code was generated for an output that cannot be written")


def test_an_output_that_cannot_be_written_costs_no_compilation(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, packed: Path, out: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(PIPELINE, "_build", never)
    shutil.copytree(packed, out)
    digest = Artifact.open(out).manifest.digest
    with pytest.raises(UsageError, match="the output exists") as caught:
        moec.compile(checkpoint, out=out)
    assert "--force" in str(caught.value) and Artifact.open(out).manifest.digest == digest
    with pytest.raises(UsageError, match="folder of the artifact does not exist") as caught:
        moec.compile(checkpoint, out=tmp_path / "no" / "such" / "a.moec")
    assert "mkdir -p" in str(caught.value)
    with pytest.raises(UsageError, match="is not an artifact, so it is not replaced"):
        moec.compile(checkpoint, out=checkpoint, force=True)


def test_force_replaces(checkpoint: Path, packed: Path, out: Path) -> None:
    shutil.copytree(packed, out)
    digest = moec.compile(checkpoint, out=out, schedules=["gather"], layers=[1], force=True).digest
    assert moec.load(out).digest == digest and list(moec.load(out)) == [1]


def test_weights_that_are_not_finite(checkpoint: Path, out: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(checkpoint, bad)
    tensors = load_file(bad / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][1, 2] = np.nan
    save_file(tensors, bad / "model.safetensors")
    run = {"out": out, "schedules": ["gather"], "layers": [0]}
    with pytest.raises(BadWeights) as caught:
        moec.compile(bad, **run)
    assert name in str(caught.value) and "allow" in str(caught.value)
    assert not out.exists()
    moec.compile(bad, options=moec.CompileOptions(allow_nonfinite=True), **run)
    x, ids = tiny.inputs(2), np.array([[3, 0], [1, 2]], np.int32)
    y = moec.load(out)[0].experts(x, ids, np.ones((2, 2), np.float32))
    assert np.isnan(y[0, 1]) and np.isfinite(np.delete(y[0], 1)).all() and np.isfinite(y[1]).all()


def exhausted(*_: Any, **__: Any) -> Any:
    raise MemoryError


def full(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["memory", "room", "dump"])
def test_resources_that_run_out(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, out: Path, tmp_path: Path, where: str
) -> None:
    options = moec.CompileOptions(dump_ir=tmp_path / "ir" if where == "dump" else None)
    if where == "memory":
        monkeypatch.setattr(packing, "aligned", exhausted)
    elif where == "room":
        usage = shutil.disk_usage(tmp_path)._replace(free=100)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ResourceError) as caught:
        moec.compile(checkpoint, out=out, schedules=["gather"], layers=[0], options=options)
    words = {"memory": "memory ran out", "room": "are free", "dump": "the disk is full"}
    assert words[where] in caught.value.message
    assert caught.value.exit_code == 6 and caught.value.hint and not out.exists()


def test_a_kind_without_backend() -> None:
    with pytest.raises(TargetError, match="there is no backend for 'abacus'") as caught:
        backend("abacus")
    assert "cpu" in str(caught.value)
