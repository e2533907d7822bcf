"""`moec selftest` on this machine's CPU."""

from __future__ import annotations

import json

import pytest

from moec import cli
from moec.selftest import layers


def test_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from moec.quickstart import runs

    monkeypatch.setattr(runs, "_SECONDS", 0.0)
    assert cli.main(["selftest", "--quick", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["device"] == "cpu" and facts["target"].startswith("cpu-")
    assert len(facts["layers"]) == len(layers.LAYERS)
    assert all(row["ok"] for layer in facts["layers"] for row in layer["rows"])
