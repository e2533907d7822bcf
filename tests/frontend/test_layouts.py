"""Every layout of every family: the same weights written in another way are read alike.

The weights are those of transformers' models; the files are written by tests/frontend/
layouts.py with the safetensors library. Orientation must follow the family where sizes
would allow either (H = 2I for gate_up, H = I for down).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moec.checkpoint import Checkpoint
from moec.errors import BadWeights
from moec.frontend import builtin, read_model
from tests.conftest import Saved
from tests.frontend import canonical, layouts, small
from tests.frontend.layouts import PLAIN, Tensors, W, Writer, direct, input_major, interleaved
from tests.frontend.test_families import assert_same_bits, assert_weights
from tests.frontend.test_family_files import QWEN
from tests.models import DTYPES, FAMILIES

B, A = layouts.stacked, input_major
# (family, layout) -> (writer, name of the block, is its own name for the router)
QWEN_LIKE = {"per_expert": PLAIN, "stacked": B, "stacked_direct": direct(B)}
MIXTRAL_LIKE = {"per_expert_w": W, "stacked": B, "stacked_direct": direct(B), "renamed": B}
WRITERS: dict[str, dict[str, Writer]] = {
    "mixtral": MIXTRAL_LIKE,
    "phimoe": MIXTRAL_LIKE,
    "qwen2_moe": QWEN_LIKE,
    "qwen3_moe": QWEN_LIKE,
    "olmoe": QWEN_LIKE,
    "deepseek_v3": QWEN_LIKE,
    "gpt_oss": {
        "stacked_input_major": interleaved(A),
        "stacked_input_major_direct": interleaved(direct(A)),
    },
    "llama4_text": {"stacked_input_major": A, "stacked_input_major_direct": direct(A)},
    "gemma4_text": {"stacked": B, "moe_prefix": direct(B)},
}
BLOCKS = {
    "mixtral": "block_sparse_moe.",
    "phimoe": "block_sparse_moe.",
    "llama4_text": "feed_forward.",
    "gemma4_text": "",
    ("mixtral", "renamed"): "mlp.",
    ("phimoe", "renamed"): "mlp.",
    ("gemma4_text", "moe_prefix"): "moe.",
}
CASES = [
    pytest.param(family, layout, dtype, shards, id=f"{family}-{layout}-{dtype}-{shards}")
    for family, writers in WRITERS.items()
    for layout in writers
    for dtype in DTYPES
    for shards in (1, 3)
]


def test_every_layout_has_a_writer() -> None:
    """A layout added to a family without a test of it shows here."""
    own = {f.family: list(f.layouts) for f in builtin() if f.family in FAMILIES}
    assert own == {family: list(writers) for family, writers in WRITERS.items()}


def rewritten(module: Any, saved: Tensors, family: str, layout: str) -> Tensors:
    """The tensors of a saved checkpoint with the experts in another layout."""
    block = BLOCKS.get((family, layout), BLOCKS.get(family, "mlp."))
    out = {n: t for n, t in saved.items() if not is_expert(n)}
    if block == "mlp.":
        out = {n.replace("block_sparse_moe.", "mlp."): t for n, t in out.items()}
    for layer in canonical_layers(module):
        want = canonical.parameters(module, family, layer)
        prefix = f"model.layers.{layer}.{block}"
        out |= WRITERS[family][layout](want["gate_up"], want["down"], prefix)
        if family == "gpt_oss":
            bias = np.empty_like(want["gate_up_bias"])
            half = bias.shape[1] // 2
            bias[:, 0::2] = want["gate_up_bias"][:, :half]
            bias[:, 1::2] = want["gate_up_bias"][:, half:]
            level = "" if layout.endswith("direct") else "experts."
            kind = want["gate_up"].dtype
            out[f"{prefix}{level}gate_up_proj_bias"] = bias.astype(kind)
            out[f"{prefix}{level}down_proj_bias"] = want["down_bias"].astype(kind)
    return out


def is_expert(name: str) -> bool:
    return ".experts." in name


def canonical_layers(module: Any) -> list[int]:
    from tests.models import moe_layers

    return moe_layers(module)


@pytest.mark.parametrize(("family", "layout", "dtype", "shards"), CASES)
def test_layouts(
    saved: Saved, tmp_path: Path, family: str, layout: str, dtype: str, shards: int
) -> None:
    module, path = saved(family, "b" if shards > 1 else "a", dtype)
    tensors = rewritten(module, load_file(path / "model.safetensors"), family, layout)
    config = json.loads((path / "config.json").read_text())
    tensors = {n: np.ascontiguousarray(t) for n, t in tensors.items()}
    small.write(tmp_path, config, tensors, shards if shards > 1 else 0)
    model = read_model(tmp_path)
    assert {block.layout for block in model.blocks} == {layout}
    assert_weights(model, tmp_path, lambda n: canonical.parameters(module, family, n))


def family_file(path: Path, chosen: list[str], **own: dict[str, str]) -> Path:
    path.write_text(json.dumps({**QWEN, "layouts": chosen, "own_layouts": own}))
    return path


def random(dtype: str, e: int, h: int, i: int) -> tuple[Any, Any, Any]:
    draw = np.random.default_rng(0)
    return tuple(
        draw.standard_normal(shape).astype(small.DTYPES[dtype])
        for shape in ((e, h), (e, 2 * i, h), (e, h, i))
    )


def one_layer(path: Path, dtype: str, tensors: Tensors, e: int, h: int, i: int) -> Path:
    config = small.config(dtype, num_hidden_layers=1, num_experts=e, hidden_size=h,
                          moe_intermediate_size=i)  # fmt: skip
    return small.write(path, config, {n: np.ascontiguousarray(t) for n, t in tensors.items()})


OWN: dict[str, tuple[dict[str, str], Writer]] = {
    "three_stacks": ({}, layouts.three_stacks),
    "stacked_input_major": ({}, A),
    "stacked_input_major_direct": ({}, direct(A)),
    "per_expert_w": ({}, W),
    "interleaved_b": (
        {"gate_up": "{x}experts.gate_up_proj [E,2I,H] interleaved",
         "down": "{x}experts.down_proj [E,H,I]"},
        interleaved(B),
    ),
    "flat": (
        {"gate": "mlp.experts.w1 [E*I,H]", "up": "mlp.experts.v1 [E*I,H]",
         "down": "mlp.experts.w2 [E*I,H]"},
        layouts.flat,
    ),
    "alternatives": (
        {"gate": ["{x}experts.{e}.w1.weight [I,H]", "{x}experts.{e}.gate_proj.weight [I,H]"],
         "up": ["{x}experts.{e}.w3.weight [I,H]", "{x}experts.{e}.up_proj.weight [I,H]"],
         "down": ["{x}experts.{e}.w2.weight [H,I]", "{x}experts.{e}.down_proj.weight [H,I]"]},
        PLAIN,
    ),
    "experts_in_the_middle": (
        {"gate_up": "mlp.experts.gate_up_proj [2I,E,H]", "down": "mlp.experts.down_proj [H,I,E]"},
        lambda g, d, b: {f"{b}experts.gate_up_proj": g.transpose(1, 0, 2),
                         f"{b}experts.down_proj": d.transpose(1, 2, 0)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(4, 8, 6), (3, 12, 6), (3, 6, 6)], ids=["", "H=2I", "H=I"])
@pytest.mark.parametrize("layout", OWN)
def test_layouts_of_a_user(
    tmp_path: Path, layout: str, sizes: tuple[int, int, int], dtype: str
) -> None:
    own, writer = OWN[layout]
    router, gate_up, down = random(dtype, *sizes)
    tensors = {"model.layers.0.mlp.gate.weight": router}
    tensors |= writer(gate_up, down, "model.layers.0.mlp.")
    path = one_layer(tmp_path / "model", dtype, tensors, *sizes)
    named = {layout: own} if own else {}
    model = read_model(path, family_file(tmp_path / "f.json", [layout], **named))
    want = {"router": router, "gate_up": gate_up, "down": down}
    assert model.blocks[0].layout == layout
    assert_weights(model, path, lambda n: want)


@pytest.mark.parametrize("sizes", [(3, 12, 6), (3, 6, 6)], ids=["H=2I", "H=I"])
def test_orientation_follows_the_family_not_the_shape(
    tmp_path: Path, sizes: tuple[int, int, int]
) -> None:
    """A tensor whose shape fits both conventions goes by the layout, listed alone or not.

    H = 2I and H = I cannot hold at once, so the other projection always tells; a reader that
    went tensor by tensor would still take the ambiguous one the wrong way around.
    """
    e, h, i = sizes
    draw = np.random.default_rng(1)
    square = h == 2 * i
    stored = {
        "gate_up": draw.standard_normal((e, h, h) if square else (e, 2 * i, h)).astype("f4"),
        "down": draw.standard_normal((e, h, i) if square else (e, h, h)).astype("f4"),
    }
    tensors = {
        "model.layers.0.mlp.gate.weight": draw.standard_normal((e, h)).astype("f4"),
        "model.layers.0.mlp.experts.gate_up_proj": stored["gate_up"],
        "model.layers.0.mlp.experts.down_proj": stored["down"],
    }
    ambiguous = "gate_up" if square else "down"
    other = "down" if square else "gate_up"
    both = ["stacked", "stacked_input_major"]
    for order in (both, both[::-1], both[:1], both[1:]):
        written = dict(tensors)
        if order[0] == "stacked_input_major":  # the projection of which the shape tells
            name = f"model.layers.0.mlp.experts.{other}_proj"
            written[name] = stored[other].swapaxes(1, 2)
        path = one_layer(tmp_path / "-".join(order), "float32", written, *sizes)
        model = read_model(path, family_file(tmp_path / "f.json", order))
        assert model.blocks[0].layout == order[0]
        with Checkpoint.open(path) as checkpoint:
            got = model.blocks[0].plan.tensor(checkpoint, ambiguous)
            same = model.blocks[0].plan.tensor(checkpoint, other)
        want = stored[ambiguous]
        assert_same_bits(got, want if order[0] == "stacked" else want.swapaxes(1, 2))
        assert_same_bits(same, stored[other])


def test_the_listed_order_gives_way_to_the_layout_that_fits(tmp_path: Path) -> None:
    e, h, i = 3, 6, 6
    router, gate_up, down = random("float32", e, h, i)
    tensors = {"model.layers.0.mlp.gate.weight": router} | A(gate_up, down, "model.layers.0.mlp.")
    path = one_layer(tmp_path / "model", "float32", tensors, e, h, i)
    both = ["stacked", "stacked_input_major"]
    # The shape of gate_up fits A alone, so A is found although B is listed first.
    model = read_model(path, family_file(tmp_path / "f.json", both))
    assert model.blocks[0].layout == "stacked_input_major"
    assert_weights(model, path, lambda n: {"router": router, "gate_up": gate_up, "down": down})


def test_between_layouts_that_fit_equally_the_first_one_listed_wins(tmp_path: Path) -> None:
    """Interleaved or not cannot be seen from outside."""
    router, gate_up, down = random("float32", 4, 8, 6)
    own = {"interleaved_b": OWN["interleaved_b"][0]}
    for order, writer in (
        (["interleaved_b", "stacked"], interleaved(B)),
        (["stacked", "interleaved_b"], B),
    ):
        tensors = {"model.layers.0.mlp.gate.weight": router}
        tensors |= writer(gate_up, down, "model.layers.0.mlp.")
        path = one_layer(tmp_path / order[0], "float32", tensors, 4, 8, 6)
        model = read_model(path, family_file(tmp_path / "f.json", order, **own))
        assert model.blocks[0].layout == order[0]
        want = {"router": router, "gate_up": gate_up, "down": down}
        assert_weights(model, path, lambda n, want=want: want)


def test_a_family_of_the_other_convention_refuses(tmp_path: Path) -> None:
    router, gate_up, down = random("float32", 4, 8, 6)
    tensors = {"model.layers.0.mlp.gate.weight": router} | A(gate_up, down, "model.layers.0.mlp.")
    path = one_layer(tmp_path, "float32", tensors, 4, 8, 6)
    with pytest.raises(BadWeights) as caught:
        read_model(path)  # qwen3_moe keeps [E, 2I, H]
    assert "experts.gate_up_proj' has the shape [4, 8, 12] (need [4, 12, 8] float32)" in str(
        caught.value
    )


def test_one_layout_per_layer(tmp_path: Path) -> None:
    """Layers may differ: a checkpoint that was half converted."""
    arrays = small.tensors()
    router, gate_up, down = random("float32", 4, 8, 6)
    kept = {n: t for n, t in arrays.items() if not n.startswith("model.layers.1.mlp.")}
    kept |= {"model.layers.1.mlp.gate.weight": router} | B(gate_up, down, "model.layers.1.mlp.")
    model = read_model(small.write(tmp_path, None, kept))
    assert [block.layout for block in model.blocks] == ["per_expert", "stacked"]


def test_tied_files_are_read_by_the_index(tmp_path: Path) -> None:
    """Files that the index does not name are none of our business."""
    path = small.write(tmp_path, shards=3)
    save_file({"model.norm.weight": np.ones(3, "f4")}, path / "model-extra.safetensors")
    (path / "training_args.bin").write_bytes(b"pickle")
    assert len(read_model(path).blocks) == 2
