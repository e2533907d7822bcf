"""The graph of a block reads like its definition, and its text parses back to the same graph."""

from __future__ import annotations

import pytest
import tvm
from tvm.script import from_source

from moec.frontend import read_model
from moec.frontend.graph import build_graph, signatures
from tests import models
from tests.conftest import Golden, Saved


@pytest.fixture(params=models.FAMILIES)
def graph(saved: Saved, request: pytest.FixtureRequest) -> tvm.IRModule:
    """The first MoE block of a family, before any pass."""
    _, path = saved(request.param, "a", "bfloat16")
    return build_graph(read_model(path).blocks[0].spec)


def test_graph(graph: tvm.IRModule, golden: Golden) -> None:
    text = graph.script()
    golden(text)
    tvm.ir.assert_structural_equal(from_source(text), graph, map_free_vars=False)


def test_a_changed_attribute_is_another_graph(saved: Saved) -> None:
    _, path = saved("mixtral", "a", "bfloat16")
    graph = build_graph(read_model(path).blocks[0].spec)
    text = graph.script()
    for old, new in (("scale=1.0", "scale=2.0"), ('renorm="sum"', 'renorm="none"')):
        assert old in text
        with pytest.raises(ValueError, match="StructuralEqual check failed"):
            tvm.ir.assert_structural_equal(from_source(text.replace(old, new)), graph)


def test_parameters_are_those_of_the_spec(saved: Saved) -> None:
    _, path = saved("gemma4_text", "a", "bfloat16")
    spec = read_model(path).blocks[0].spec
    graph = build_graph(spec)
    for signature in signatures(spec):
        params = {p.name: p.ty for p in graph[signature.name].params}
        assert tuple(params) == (*signature.inputs, *signature.parameters)
        for name in signature.parameters:
            assert [int(d) for d in params[name].shape] == list(spec.parameters()[name].shape)
