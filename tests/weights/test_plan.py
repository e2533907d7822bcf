"""Weight plans: every element read once, in the right place, or a problem that names it."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.checkpoint import Checkpoint
from moec.errors import BadCheckpoint, BadWeights
from moec.frontend import builtin, find_problems, outline, read_model, survey
from moec.frontend.sources import SLOTS, combinations, make_pieces, parse_source
from moec.weights import ParamPlan, Piece, WeightPlan
from tests.conftest import Saved
from tests.frontend import small
from tests.models import FAMILIES

ALL_LAYOUTS = sorted((f.family, layout) for f in builtin() for layout in f.layouts)


@pytest.mark.parametrize("family", FAMILIES)
def test_json_round_trip(saved: Saved, family: str) -> None:
    model = read_model(saved(family, "b", "bfloat16")[1])
    for block in model.blocks:
        text = json.dumps(block.plan.to_json(), sort_keys=True)
        again = WeightPlan.from_json(json.loads(text))
        assert again == block.plan
        assert [name for name, _ in again.params] == [*block.spec.parameters()]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ALL_LAYOUTS), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)
)  # fmt: skip
def test_every_element_of_every_source_is_read_exactly_once(
    chosen: tuple[str, str], e: int, h: int, i: int
) -> None:
    """Elements are numbered, cut out as the plan says, and counted."""
    own = next(f for f in builtin() if f.family == chosen[0])
    dims = {"E": e, "H": h, "I": i, "F": 3, "1": 1}
    table = {slot: parse_source(t, "f") for slot, t in own.layouts[chosen[1]].items()}
    for param in {SLOTS[slot].param for slot in table}:
        slots = next(s for s in combinations(param) if all(name in table for name in s))
        pieces: list[Piece] = []
        for slot in slots:
            row = pieces[-1].rows[1] if pieces else 0
            pieces += make_pieces(SLOTS[slot], table[slot], table[slot].name, row, dims, "f")
        rows = {"gate_up": (2 * i, h), "down": (h, i), "gate_up_bias": (2 * i,), "down_bias": (h,)}
        plan = ParamPlan((e, *rows[param]), "float32", True, tuple(pieces))
        seen: Counter[tuple[str, int]] = Counter()
        filled = np.zeros((e, *rows[param]), int)
        for expert in range(e):
            for piece in plan.pieces:
                ids = np.arange(math.prod(piece.shape)).reshape(piece.shape)
                cut = piece.cut(ids, expert)
                name = piece.name(expert)
                seen.update((name, int(x)) for x in cut.ravel())
                target = filled[expert, piece.rows[0] : piece.rows[1]]
                target += np.ones_like(cut).reshape(target.shape)
        assert set(seen.values()) == {1} and (filled == 1).all()
        sizes = {p.name(x): math.prod(p.shape) for p in plan.pieces for x in range(e)}
        assert len(seen) == sum(sizes.values())


def remove(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        for name in names:
            del arrays[name]

    return change


def replace(**new: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.update({n.replace("__", "."): t for n, t in new.items()})


UP, DOWN = small.expert(1, 2, "up"), small.expert(1, 2, "down")
ROUTER = small.ROUTER.format(layer=0)
ROWS: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "missing": (remove(UP), [f"tensor {UP!r} is missing (need [6, 8] float32)"]),
    "missing router": (remove(ROUTER), [f"tensor {ROUTER!r} is missing (need [4, 8] float32)"]),
    "shape": (
        lambda a: a.update({DOWN: a[DOWN].T.copy()}),
        [f"tensor {DOWN!r} has the shape [6, 8] (need [8, 6] float32)"],
    ),
    "rank": (
        lambda a: a.update({DOWN: a[DOWN].ravel()}),
        [f"tensor {DOWN!r} has the shape [48] (need [8, 6] float32)"],
    ),
    "mixed dtypes": (
        lambda a: a.update({UP: a[UP].astype("f2")}),
        [f"tensor {UP!r} of gate_up is float16 (need [6, 8] float32)"],
    ),
    "unsupported dtype": (
        lambda a: a.update({UP: a[UP].astype("i1")}),
        [f"tensor {UP!r} has the unsupported dtype int8 (need [6, 8] float32)"],
    ),
    "unsupported router": (
        lambda a: a.update({ROUTER: a[ROUTER].astype("f8")}),
        [f"tensor {ROUTER!r} has the unsupported dtype float64 (need [4, 8] float32)"],
    ),
    "extra expert": (
        lambda a: a.update({small.expert(0, 4, "up"): a[UP]}),
        [f"tensor {small.expert(0, 4, 'up')!r} [6, 8] float32 is not used by anything"
         " (need only tensors that the family knows)"],
    ),
    "extra tensor": (
        lambda a: a.update({"model.layers.0.mlp.gate.bias": np.zeros(4, "f4")}),
        ["tensor 'model.layers.0.mlp.gate.bias' [4] float32 is not used by anything"
         " (need only tensors that the family knows)"],
    ),
    "several": (
        lambda a: (a.pop(UP), a.update({DOWN: a[DOWN][:2]})),
        [f"tensor {UP!r} is missing (need [6, 8] float32)",
         f"tensor {DOWN!r} has the shape [2, 6] (need [8, 6] float32)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_problems(tmp_path: Path, row: str) -> None:
    change, expected = ROWS[row]
    arrays = small.tensors()
    change(arrays)
    path = small.write(tmp_path, None, arrays)
    assert sorted(map(str, survey(path).problems)) == sorted(expected)
    with pytest.raises(BadWeights) as caught:
        read_model(path)
    error = caught.value
    assert error.exit_code == 3 and str(path) in error.where and error.need
    assert f"'moec inspect {path}' lists every problem" in error.hint
    if len(expected) == 1:
        assert error.message == expected[0].split(" (need ")[0]
        missing = "missing" in row
        assert error.where == str(path if missing else path / "model.safetensors")


def test_the_first_five_of_many_problems(tmp_path: Path) -> None:
    names = [n for n in small.tensors() if "layers.1.mlp.experts" in n]
    arrays = small.tensors()
    remove(*names)(arrays)
    path = small.write(tmp_path, None, arrays)
    with pytest.raises(BadWeights) as caught:
        read_model(path)
    lines = caught.value.message.splitlines()
    assert lines[0] == "12 problems with the weights:" and lines[-1] == "  - and 7 more"
    assert len(lines) == 7 and all(line.startswith("  - tensor 'model.") for line in lines[1:6])


def test_a_listing_that_would_never_end_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moec.frontend import model

    monkeypatch.setattr(model, "MAX_PROBLEMS", 3)
    path = small.write(tmp_path, small.config(num_experts=60))
    with Checkpoint.open(path) as checkpoint:
        problems = find_problems(outline(checkpoint), checkpoint)
    assert len(problems) == 4 and str(problems[-1]) == "there are more than 3 problems"


def test_a_layer_of_the_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(BadWeights, match="layer 1 is dense by the config, but there is tensor"):
        read_model(small.write(tmp_path / "a", small.config(mlp_only_layers=[1])))
    with pytest.raises(BadWeights) as caught:
        read_model(small.write(tmp_path / "b", None, {"model.layers.0.x": np.ones(2, "f4")}))
    assert caught.value.message == (
        "layer 0 has no MoE tensors under any name of the family qwen3_moe"
    )
    assert caught.value.need == "model.layers.0.mlp.*, layers.0.mlp.*"
    assert caught.value.hint == "the layer holds model.layers.0.x"


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_the_dtype_of_the_config_is_that_of_the_files(tmp_path: Path, stored: str) -> None:
    path = small.write(tmp_path, small.config("float32"), small.tensors(stored))
    with pytest.raises(BadWeights) as caught:
        read_model(path)
    name = small.expert(0, 0, "down")
    assert caught.value.message == f"config.json says float32, but tensor {name!r} is {stored}"
    assert caught.value.where == str(path / "model.safetensors")
    assert "set dtype in config.json" in caught.value.hint


def test_an_unsupported_dtype_without_config(tmp_path: Path) -> None:
    arrays = {n: t.astype("f8") for n, t in small.tensors().items()}
    with pytest.raises(BadWeights, match=r"down_proj\.weight' is float64") as caught:
        read_model(small.write(tmp_path, small.config(dtype=KeyError), arrays))
    assert caught.value.need == "expert weights in float32 or bfloat16 or float16"


VALUES = {
    "nan": float("nan"),
    "minus nan": float("-nan"),
    "inf": float("inf"),
    "minus inf": float("-inf"),
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", small.DTYPES)
@pytest.mark.parametrize("at", [0, -1])
def test_nonfinite_weights_are_refused(tmp_path: Path, value: str, dtype: str, at: int) -> None:
    for name, parameter in ((UP, "gate_up"), (DOWN, "down"), (ROUTER, "router")):
        arrays = small.tensors(dtype)
        arrays[name].reshape(-1)[at] = VALUES[value]
        path = small.write(tmp_path / parameter, small.config(dtype), arrays)
        model = read_model(path)  # headers alone do not tell
        layer = 0 if parameter == "router" else 1
        plan = model.blocks[layer].plan
        with Checkpoint.open(path) as checkpoint:
            with pytest.raises(BadWeights) as caught:
                plan.tensor(checkpoint, parameter)
            assert caught.value.message == f"tensor {name!r} holds NaN or Inf"
            assert caught.value.where == str(path / "model.safetensors")
            assert caught.value.need == "finite weights"
            assert "--allow-nonfinite" in caught.value.hint
            got = plan.tensor(checkpoint, parameter, allow_nonfinite=True)
            assert not np.isfinite(got.astype("f4")).all()
            if parameter != "router":
                with pytest.raises(BadWeights, match="holds NaN or Inf"):
                    plan.expert(checkpoint, parameter, 2)
                plan.expert(checkpoint, parameter, 1)


@pytest.mark.parametrize("dtype", small.DTYPES)
def test_the_largest_and_the_smallest_numbers_are_finite(tmp_path: Path, dtype: str) -> None:
    import ml_dtypes

    kind = small.DTYPES[dtype]
    limits = ml_dtypes.finfo(kind)
    edge = [limits.max, -limits.max, limits.smallest_subnormal, -0.0, 0.0]
    arrays = small.tensors(dtype)
    arrays[UP][0, :5] = np.array(edge, dtype=kind)
    path = small.write(tmp_path, small.config(dtype), arrays)
    plan = read_model(path).blocks[1].plan
    with Checkpoint.open(path) as checkpoint:
        got = plan.expert(checkpoint, "gate_up", 2)
    np.testing.assert_array_equal(got[6:].view("u1"), arrays[UP].view("u1"))


def test_a_nan_far_inside_a_large_tensor(tmp_path: Path) -> None:
    # larger than the chunk in which values are judged
    e, h, i = 2, 1030, 300
    draw = np.random.default_rng(0)
    kind = small.DTYPES["bfloat16"]
    names = {"gate.weight": (e, h), "experts.gate_up_proj": (e, 2 * i, h),
             "experts.down_proj": (e, h, i)}  # fmt: skip
    arrays = {
        f"model.layers.0.mlp.{n}": draw.standard_normal(s).astype(kind) for n, s in names.items()
    }
    config = small.config("bfloat16", num_hidden_layers=1, num_experts=e, hidden_size=h,
                          moe_intermediate_size=i)  # fmt: skip
    target = arrays["model.layers.0.mlp.experts.gate_up_proj"].reshape(-1)
    for place in (1 << 18, (1 << 18) - 1, (1 << 18) + 1, target.size - 1):
        kept = target[place]
        target[place] = np.nan
        path = small.write(tmp_path / str(place), config, arrays)
        target[place] = kept
        plan = read_model(path).blocks[0].plan
        with Checkpoint.open(path) as checkpoint, pytest.raises(BadWeights, match="NaN or Inf"):
            plan.tensor(checkpoint, "gate_up")


@pytest.mark.parametrize("dtype", small.DTYPES)
def test_large_transposed_and_interleaved_copies(tmp_path: Path, dtype: str) -> None:
    """Beyond one tile of the transposing copy, in sizes that are no multiple of it."""
    draw = np.random.default_rng(2)
    stored = draw.standard_normal((2, 131, 2 * 259)).astype(small.DTYPES[dtype])  # [E, H, 2I]
    from safetensors.numpy import save_file

    save_file({"w": stored}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    dims = {"E": 2, "H": 131, "I": 259, "F": 1, "1": 1}
    source = parse_source("w [E,H,2I] interleaved", "f")
    pieces = make_pieces(SLOTS["gate_up"], source, "w", 0, dims, "f")
    plan = WeightPlan((("gate_up", ParamPlan((2, 518, 131), dtype, True, pieces)),))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert plan.problems(checkpoint) == []
        got = plan.tensor(checkpoint, "gate_up")
    want = np.concatenate([stored[:, :, 0::2], stored[:, :, 1::2]], axis=2).swapaxes(1, 2)
    np.testing.assert_array_equal(got.view("u1"), np.ascontiguousarray(want).view("u1"))


def test_vectors_of_any_float_dtype_become_float32(saved: Saved) -> None:
    _, path = saved("gpt_oss", "b", "bfloat16")
    plan = read_model(path).blocks[0].plan
    with Checkpoint.open(path) as checkpoint:
        for name in ("router_bias", "gate_up_bias", "down_bias"):
            assert plan[name].is_vector and plan.tensor(checkpoint, name).dtype == np.float32
        with pytest.raises(BadWeights, match="router_bias is not kept by expert"):
            plan.expert(checkpoint, "router_bias", 0)
        for wrong in (-1, 5):
            with pytest.raises(BadWeights, match=f"there is no expert {wrong} in down"):
                plan.expert(checkpoint, "down", wrong)
        with pytest.raises(BadWeights, match="the plan has no parameter 'up'"):
            plan.tensor(checkpoint, "up")


def test_a_plan_for_other_files(tmp_path: Path) -> None:
    """A plan bound later to a checkpoint that differs is refused while reading, too."""
    plan = read_model(small.write(tmp_path / "a")).blocks[1].plan
    with Checkpoint.open(small.write(tmp_path / "b", None, small.tensors("float16"))) as other:
        with pytest.raises(BadWeights, match="is float16"):
            plan.tensor(other, "gate_up")
        with pytest.raises(BadWeights, match="13 problems with the weights"):
            plan.check(other)
    arrays = small.tensors()
    arrays[UP] = arrays[UP][:3]
    with Checkpoint.open(small.write(tmp_path / "c", None, arrays)) as other:
        with pytest.raises(BadWeights, match=r"has the shape \[3, 8\]"):
            plan.tensor(other, "gate_up")
    del arrays[UP]
    with Checkpoint.open(small.write(tmp_path / "d", None, arrays)) as other:
        with pytest.raises(BadCheckpoint, match="there is no tensor"):
            plan.tensor(other, "gate_up")


def test_damaged_plans_are_refused(tmp_path: Path) -> None:
    good = read_model(small.write(tmp_path)).blocks[0].plan.to_json()
    assert WeightPlan.from_json(good)

    def places(node: Any, path: tuple[Any, ...] = ()) -> Any:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items if isinstance(node, (dict, list)) else ():
            yield (*path, key)
            if isinstance(value, (dict, list)):
                yield from places(value, (*path, key))

    tried = 0
    for place in list(places(good)):
        for bad in (None, -3, [], {}, "no such thing", float("inf")):
            data = copy.deepcopy(good)
            node = data
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = bad
            tried += 1
            try:
                again = WeightPlan.from_json(data)
            except BadWeights:
                continue
            # What is taken is a plan: it can be compared with files, and written again.
            assert WeightPlan.from_json(again.to_json()) == again
    assert tried > 500
