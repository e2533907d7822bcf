"""The compact form of bfloat16 weights on CUDA: packing, boxes, and what is refused.

Packing is held against a reader and a packer that were written from the description of the form
(moec/schedules/cuda/compact.py). What kernels compute of it is checked on a GPU, by tests/gpu.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st

from moec import target
from moec.compiler.instruments import Observer
from moec.compiler.lower import Lowered, lower
from moec.compiler.options import CompileOptions
from moec.compiler.pack import Packing
from moec.errors import TargetError
from moec.schedules import backend, choose
from moec.schedules.cpu.codegen import compile_module
from moec.schedules.cuda import SCHEDULES, compact, shrink
from moec.schedules.cuda.boxes import header_box, unit_box
from moec.schedules.cuda.stream import SHARED_LIMIT
from moec.spec import ExpertsSpec, MoESpec, Renorm, RouterSpec
from tests.blocks import Small, build, random_parameters
from tests.schedules.test_cuda import RARE, block, needs_nvrtc
from tests.schedules.test_cuda_boxes import copied

Array = np.ndarray[Any, Any]
HOPPER, BOTH = "cuda:sm_90a-compact", "cuda:sm_90a-both"


def packed(bits: Array, gated: bool) -> Array:
    """[rows, K] of uint16 -> the expert's words."""
    layout = compact.Layout(1, *bits.shape)
    kernel = shrink.pack("pack", layout, gated)
    module = compile_module({"pack": kernel.func}, target.resolve("cpu"))
    out = np.full(layout.shape[1], -1, np.int32)
    arrays = (tvm_ffi.from_dlpack(a, require_alignment=2) for a in (bits, out))
    module["pack"](*arrays, 2)
    return out


def read(words: Array, rows: int, inner: int, gated: bool) -> tuple[Array, Array]:
    """([rows, K] of bits, exceptions by strip), as the form is described."""
    strips, header_bytes = rows // 8, 128 if inner <= 4096 else 256
    room, size = (header_bytes - 16) // 8, header_bytes + inner // 64 * 768
    raw = words.view(np.uint8)
    held = raw[: strips * size].reshape(strips, size)
    rest = raw[strips * size :].view(np.uint32).reshape(-1, 2)
    halves = held[:, header_bytes:].reshape(strips, inner // 32, 384)
    low = halves[:, :, :256].reshape(strips, -1, 32, 8)
    codes = halves[:, :, 256:].copy().view(np.uint32)[..., None]
    place = np.arange(8)
    names = codes >> (4 * place).astype(np.uint32) & 7
    signs = codes >> np.where(place < 4, 8 * place + 7, 8 * (place - 4) + 3).astype(np.uint32) & 1
    high = np.take_along_axis(held[:, :8], names.reshape(strips, -1).astype(int), 1)
    values = signs.astype(int) << 15 | high.reshape(low.shape).astype(int) << 8 | low
    header = held[:, 8:16].copy().view(np.int32)
    inside = held[:, 16:header_bytes].copy().view(np.uint32).reshape(strips, room, 2)
    for strip, (count, first) in enumerate(header):
        own = [inside[strip, n] if n < room else rest[first + n - room] for n in range(count)]
        for what, where in own:
            values[strip, where & 0xFFFF, what >> 20, what >> 16 & 15] = what & 0xFFFF
        assert not inside[strip, count:].any()
        check_chains(own)
    # lane 4 g + q, place 4 s + 2 j + i: row g, column 16 s + 8 j + 2 q + i
    parts = values.reshape(strips, -1, 8, 4, 2, 2, 2).transpose(0, 2, 1, 4, 5, 3, 6)
    out = parts.reshape(strips, 8, inner)
    if gated:
        out = out.reshape(strips // 2, 2, 8, inner).transpose(1, 0, 2, 3)
    return out.reshape(rows, inner).astype(np.uint16), header[:, 0]


def check_chains(own: list[Array]) -> None:
    """From its highest exception on a lane comes to all of its own, half by half."""
    lanes = [int(what) >> 20 for what, _ in own]
    for lane in set(lanes):
        mine = [n for n, other in enumerate(lanes) if other == lane]
        number, seen = mine[-1], []
        while number != 0xFFFF:
            seen.append(number)
            number = int(own[number][1]) >> 16
        assert seen == mine[::-1]
        halves = [int(own[n][1]) & 0xFFFF for n in seen]
        assert halves == sorted(halves)


def normal(rows: int, inner: int, seed: int = 0) -> Array:
    values = np.random.default_rng(seed).standard_normal((rows, inner)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("rows", "inner"), [(16, 64), (48, 192), (32, 576)])
def test_every_bit_is_kept(rows: int, inner: int, gated: bool) -> None:
    bits = normal(rows, inner)
    bits[5] = 0  # a row of zeros
    bits[3, ::2] ^= 0x8000
    bits[9, 1], bits[9, 7], bits[10, 3] = 0x7F80, 0xFFC1, 0x0001  # infinity, NaN, the least
    got, _ = read(packed(bits, gated), rows, inner, gated)
    np.testing.assert_array_equal(got, bits)


@pytest.mark.parametrize(("inner", "room"), [(1024, 14), (4096, 14), (4160, 30)])
def test_exceptions_that_find_no_room_in_their_strip(inner: int, room: int) -> None:
    assert compact.Layout(1, 64, inner).inline == room
    bits = normal(64, inner)
    bits[17, 40:80] = 0x0100 * np.arange(1, 41)  # high bytes of their own, in more than one half
    bits[60, 1000:1003] = 0x2000, 0x1000, 0x0800
    words = packed(bits, False)
    got, counts = read(words, 64, inner, False)
    np.testing.assert_array_equal(got, bits)
    assert counts[2] > room and counts[7] >= 1


def test_more_exceptions_than_have_numbers_are_refused() -> None:
    bits = np.zeros((7680, 9216), np.uint16)
    bits[:8] = np.random.default_rng(0).integers(0, 1 << 16, (8, 9216))
    layout = compact.Layout(1, *bits.shape)
    high = np.bincount((bits[:8] >> 8 & 0x7F).ravel(), minlength=128)
    count = int(np.sort(high)[:-8].sum())
    assert compact.NONE < count and count - layout.inline <= layout.spare  # there is room
    with pytest.raises(ValueError, match="no compact form"):
        packed(bits, False)


def test_another_packer_writes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    path = Path(__file__).parents[2] / "bench" / "compact_weights.py"
    found = importlib.util.spec_from_file_location("compact_weights", path)
    assert found and found.loader
    other = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "compact_weights", other)
    found.loader.exec_module(other)
    for gated in (False, True):
        bits = normal(32, 2048, seed=int(gated))
        bits[20, 5:40] = 0x1234
        weight = torch.from_numpy(bits.view(np.int16))[None].view(torch.bfloat16)
        want = other.pack(torch, weight, gated)[0].numpy()
        np.testing.assert_array_equal(packed(bits, gated), want)


@settings(max_examples=25, deadline=None)
@given(
    strips=st.integers(1, 3), units=st.integers(1, 3), spread=st.integers(1, 40),
    seed=st.integers(0, 1 << 30), gated=st.booleans(),
)  # fmt: skip
def test_weights_of_any_spread_are_kept_or_refused(
    strips: int, units: int, spread: int, seed: int, gated: bool
) -> None:
    random = np.random.default_rng(seed)
    shape = (16 * strips, 64 * units)
    exponent = np.clip(random.normal(120, spread / 4, shape), 0, 255).astype(np.uint16)
    bits = random.integers(0, 2, shape) << 15 | exponent << 7 | random.integers(0, 128, shape)
    bits = bits.astype(np.uint16)
    try:
        words = packed(bits, gated)
    except ValueError as error:
        assert "no compact form" in str(error)
        layout = compact.Layout(1, *shape)
        high = bits >> 8 & 0x7F
        order = high.reshape(2, -1, 8 * shape[1]).transpose(1, 0, 2) if gated else high
        outside = 0
        for strip in order.reshape(-1, 8 * shape[1]):
            count = np.sort(np.bincount(strip, minlength=128))[:-8].sum()
            outside += max(0, count - layout.inline)
        assert outside > layout.spare
    else:
        np.testing.assert_array_equal(read(words, *shape, gated)[0], bits)


@pytest.mark.parametrize(("strips", "units"), [(2, 4), (1, 2), (3, 3)])
def test_boxes(strips: int, units: int) -> None:
    layout = compact.Layout(3, 48, 512)
    words = layout.expert_bytes // 8
    box, headers = unit_box(layout, strips, units), header_box(layout, strips)
    for e, place, k in ((0, 0, 0), (2, 5, 1), (1, 3, 2)):
        got = copied(box, box.at(k, place, e), item=8).reshape(strips, units, 96)
        strip = place + np.arange(strips)[:, None, None]
        unit = k * units + np.arange(units)[:, None]
        want = e * words + strip * (layout.strip_bytes // 8) + unit * 96 + np.arange(96)
        there = (strip < layout.strips) & (unit < layout.units)
        np.testing.assert_array_equal(got, np.where(there, want, -1))
        size = layout.header // 8
        got = copied(headers, headers.at(0, place, e), item=8).reshape(strips, size)
        want = e * words + strip[:, :, 0] * (layout.strip_bytes // 8) + np.arange(size)
        np.testing.assert_array_equal(got, np.where(strip[:, :, 0] < layout.strips, want, -1))
    assert box.offset == layout.header and headers.offset == 0
    assert layout.expert_bytes % 128 == layout.strip_bytes % 128 == 0


def lowered(spec: MoESpec, *names: str, arch: str = HOPPER) -> Lowered:
    one, own = target.resolve(arch), backend("cuda")
    return lower(
        "b0", spec, one, own, choose(own, names, spec, one), Observer(CompileOptions()), None
    )


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (block("float16"), "float16 have no compact form"),
        (block("float32"), "float32 have no compact form"),
        (block(hidden=136), "multiple of 64"),
        (RARE, "multiple of 64"),
    ],
)
@pytest.mark.parametrize("arch", [HOPPER, BOTH])
def test_blocks_without_a_compact_form_are_refused(spec: MoESpec, reason: str, arch: str) -> None:
    with pytest.raises(TargetError) as caught:
        lowered(spec, arch=arch)
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["mma16", "plain", "simple", "loop"])
def test_schedules_that_read_plain_weights_are_refused(name: str) -> None:
    with pytest.raises(TargetError, match="plain weights"):
        lowered(block(), name)


def test_only_the_weights_of_experts_are_packed() -> None:
    made = lowered(block())
    for name, parameter in block().parameters().items():
        own = made.packed[name]
        if name in ("gate_up", "down"):
            layout = compact.Layout(*parameter.shape)
            assert (own.shape, own.dtype) == (layout.shape, "int32") and own.symbol
            assert layout.expert_bytes < 1.5 * 2 * layout.rows * layout.inner
        else:
            assert (own.shape, own.dtype, own.symbol) == (parameter.shape, parameter.dtype, None)


def read_by(made: Lowered) -> dict[str, set[str]]:
    """The dtypes of the weights that the schedules of a block read."""
    return {
        v.schedule.name: {
            arg.dtype
            for symbol in v.entry.kernels
            for arg in made.kernels[symbol].args
            if arg.name == "weight"
        }
        for v in made.variants["experts"]
    }


def test_with_both_forms_every_schedule_reads_the_faster_one() -> None:
    plain, units = {"bfloat16"}, {"int32"}
    read = dict.fromkeys(("gather", "stream16", "stream32", "stream64"), units)
    made = lowered(block(), arch=BOTH)
    assert read_by(made) == {**read, "stream160": plain}
    forms = {f"{name}{tail}" for name in ("gate_up", "down") for tail in ("", "_compact")}
    assert all(forms <= {*v.entry.parameters} for v in made.variants["experts"])
    alone = lowered(block()), lowered(block(), arch="cuda:sm_90a")
    for name in ("gate_up", "down"):
        own = made.packed[f"{name}_compact"]
        assert own.source == name and own.shape == alone[0].packed[name].shape and own.symbol
        assert made.packed[name] == alone[1].packed[name]
    assert read_by(lowered(block(), "mma64", arch=BOTH)) == {"mma64": plain}
    assert {*lowered(block(), "mma64", "loop", arch=BOTH).packed} == {*alone[1].packed}
    with pytest.raises(TargetError, match="reads compact weights"):
        lowered(block(), "stream256", arch=BOTH)


@pytest.mark.parametrize(("name", "tail"), [("stream16", "_compact"), ("stream160", "")])
def test_a_form_that_no_schedule_reads_is_not_packed(name: str, tail: str) -> None:
    made = lowered(block(), name, arch=BOTH)
    own = {n for n in made.packed if n.startswith(("gate_up", "down"))}
    assert own == {f"gate_up{tail}", f"down{tail}"}
    packers = [k for k in made.kernels.values() if shrink.PACKS in k.func.attrs]
    assert len(packers) == (2 if tail else 0)


SIZES = {
    "small": (8, 2, 64, 64),
    "uneven columns": (4, 2, 2176, 64),
    "Qwen3": (128, 8, 2048, 768),
    "DeepSeek-V3": (256, 8, 7168, 2048),
    "gpt-oss": (128, 4, 2880, 2880),
    "Mixtral": (8, 2, 4096, 14336),
}
_PLACE = re.compile(r"decl_buffer\(\(([\d, ]+)\),(?: \"(\w+)\",)? data=pool_buf\.data,"
                    r"(?: elem_offset=(\d+),)?")  # fmt: skip
_BYTES = {"uint8": 1, "bfloat16": 2, "int32": 4, "": 4, "uint64": 8}


@pytest.mark.parametrize("name", SIZES)
def test_kernels_fit_the_shared_memory(name: str) -> None:
    experts = ExpertsSpec(*SIZES[name])
    router = RouterSpec(experts.num_experts, experts.top_k, renorm=Renorm.SUM)
    made = lowered(MoESpec("bfloat16", router, experts))
    seen = 0
    for symbol, kernel in made.kernels.items():
        for dims, dtype, first in _PLACE.findall(kernel.func.script()):
            size = np.prod([int(d) for d in dims.split(",") if d.strip()])
            seen += 1
            assert (int(first or 0) + size) * _BYTES[dtype] <= SHARED_LIMIT, symbol
    assert seen > 40


@pytest.mark.parametrize("form", [target.Form.PLAIN, target.Form.COMPACT])
def test_tiles_of_the_sort_are_those_of_the_matmuls(form: target.Form) -> None:
    one = target.resolve(f"cuda:sm_90a{form.suffix}")
    streams = [s for name, s in SCHEDULES.items() if name.startswith("stream")]
    own = [s for s in streams if s.supports(block(), one) is None]
    assert len(own) == (5 if form is target.Form.COMPACT else 4)
    for schedule in own:
        config = schedule.config.of(form)
        assert config.tile_rows == config.tiles.rows
        assert config.tiles is (
            schedule.config.compact if form is target.Form.COMPACT else schedule.config.tiles
        )


@pytest.mark.parametrize("name", ["cuda:sm_90a", HOPPER])
def test_warps_ask_for_no_more_registers_than_there_are(name: str) -> None:
    """They would wait for them without end; a block starts with 168 a thread."""
    spec, one, own = block(), target.resolve(name), backend("cuda")
    chosen = choose(own, (), spec, one)
    made = lower("b0", spec, one, own, chosen, Observer(CompileOptions()), None)
    seen = 0
    for symbol, kernel in made.kernels.items():
        text = kernel.func.script()
        fewer, more = (
            {int(n) for n in re.findall(rf'setmaxnreg\((\d+), "{what}"', text)}
            for what in ("dec", "inc")
        )
        if fewer or more:
            seen += 1
            assert len(fewer) == len(more) == 1, symbol
            assert 128 * fewer.pop() + 256 * more.pop() <= 384 * 168, symbol
    assert seen == (10 if one.form is target.Form.COMPACT else 8)  # two matmuls a schedule


def test_weights_without_a_compact_form_are_an_error_that_says_which() -> None:
    spec, one = block(), target.resolve(HOPPER)
    packing = Packing.__new__(Packing)
    layout = compact.Layout(*spec.parameters()["gate_up"].shape)
    kernel = shrink.pack("p", layout, True)
    packing._module = compile_module({"p": kernel.func}, target.resolve("cpu"))
    packing._threads = 1
    assert one.form is target.Form.COMPACT
    bits = np.random.default_rng(0).integers(0, 1 << 16, (layout.rows, layout.inner))
    out = np.empty(layout.shape[1], np.int32)
    with pytest.raises(TargetError, match="no compact form") as caught:
        packing.run("p", bits.astype(np.uint16), out, "gate_up of expert 3")
    assert "gate_up of expert 3" in str(caught.value) and "cuda:sm_90a" in str(caught.value)


@needs_nvrtc
def test_an_artifact_is_smaller_and_one_of_both_forms_larger(tmp_path: Path) -> None:
    spec = block(hidden=512, inner=256)
    sizes = []
    for name in ("cuda:sm_90a", HOPPER, BOTH):
        path = tmp_path / f"{name.replace(':', '-')}.moec"
        names = ("stream16", "stream160")
        build([Small(spec, names, parameters=random_parameters(spec))], path, name)
        sizes.append(sum(f.stat().st_size for f in (path / "weights").iterdir()))
    assert 0.74 < sizes[1] / sizes[0] < 0.80 and 0.99 < sizes[2] / (sizes[0] + sizes[1]) < 1
