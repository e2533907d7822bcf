"""`moec selftest -t metal` as a Mac's owner will run it, on the emulated device."""

from __future__ import annotations

import json

import pytest

from moec import cli, selftest
from moec.quickstart import runs
from moec.schedules.metal import SCHEDULES
from moec.selftest.layers import LAYERS


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_SECONDS", 0.0)
    monkeypatch.setattr(runs, "_INPUTS", 1)
    monkeypatch.setitem(selftest.main.__globals__, "TOKENS", (1, 5))


def test_the_receipt(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["selftest", "-t", "metal:emulated", "--quick"]) == 0
    out = capsys.readouterr().out
    count = 2 * len(SCHEDULES) * len(LAYERS)
    assert f"{count} of {count} results right." in out and out.count(" ok\n") == count
    assert "metal:0" in out and max(map(len, out.splitlines())) <= 80
    for layer in LAYERS:
        assert f"{layer.name}, {layer.config['dtype']}: {layer.reaches}" in out


def test_a_wrong_result_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(runs._ALLOWED, "float32", 0.0)
    monkeypatch.setitem(selftest.main.__globals__, "LAYERS", LAYERS[1:2])
    assert cli.main(["selftest", "-t", "metal:emulated", "--quick", "--json"]) == 5
    captured = capsys.readouterr()
    rows = json.loads(captured.out)["layers"][0]["rows"]
    assert len(rows) == 8 and not any(row["ok"] for row in rows)
    assert "8 of 8 results differ" in captured.err and "mixtral, float32" in captured.err


def test_a_gpu_is_sent_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["selftest", "-t", "cuda:sm_90a"]) == 4
    assert "tests/gpu" in capsys.readouterr().err
