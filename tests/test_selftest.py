"""`moec selftest` on this machine's CPU."""

from __future__ import annotations

import json
import sys

import pytest

from moec import cli, host
from moec.selftest import layers


def test_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from moec.quickstart import runs

    monkeypatch.setattr(runs, "_SECONDS", 0.0)
    assert cli.main(["selftest", "--quick", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["device"] == "cpu" and facts["target"].startswith("cpu-")
    assert len(facts["layers"]) == len(layers.LAYERS)
    assert all(row["ok"] for layer in facts["layers"] for row in layer["rows"])


def _refused(
    target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """What the self test of a target says, which must be said before anything is compiled."""
    from moec import compiler

    def never(*args: object, **options: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(compiler, "compile", never)
    assert cli.main(["selftest", "-t", target]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")
def test_metal_needs_a_mac(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = _refused("metal", capsys, monkeypatch)
    assert "needs os macos, this machine is linux" in said
    assert "need a Mac with Apple silicon" in said and "emulator" in said


def test_a_processor_that_this_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "cpu:x86-64-v3" if host.host().arch == "aarch64" else "cpu:neoverse-n1"
    assert "without -t it tests this machine" in _refused(other, capsys, monkeypatch)
