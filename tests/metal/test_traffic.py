"""Bytes that the matmuls read, against the floor of their regime (tests/metal/traffic.py)."""

from __future__ import annotations

import pytest

from tests.metal.traffic import CASES, Case, measure


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bytes_read(case: Case) -> None:
    rows, log = measure(case)
    for row in rows:
        # Row order, offsets, ids and weights are some hundred bytes beside the weights.
        assert row.needed <= row.distinct <= 1.02 * row.needed
        assert row.read <= case.regime.value * row.needed, row
        if row.tile_floor is not None:
            assert row.read <= 1.10 * row.tile_floor, row
    assert all(launch.threadgroup_memory <= 32768 for launch in log)


def test_decode_needs_no_more_than_two_launches_of_matmuls_and_one_of_output() -> None:
    _, log = measure(CASES[0])
    assert len(log) == 3
