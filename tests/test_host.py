"""What the machine is said to be, and what is missing for code that needs more."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec import host
from moec.errors import UsageError
from moec.host import Host

MACHINE = Host("linux", "x86_64", "Test", frozenset({"avx2", "fma"}), 4, 100, 50)


@pytest.mark.parametrize(
    ("requires", "reason"),
    [
        ({}, None),
        ({"os": "linux", "arch": "x86_64", "features": ["fma"]}, None),
        ({"os": "macos"}, "needs os macos, this machine is linux"),
        ({"arch": "aarch64"}, "needs arch aarch64, this machine is x86_64"),
        ({"features": ["fma", "zzz", "avx9"]}, "this CPU (Test) lacks avx9, zzz"),
        ({"npu": "X1"}, "requirement 'npu' is not known to this version of moec"),
    ],
)
def test_missing(requires: dict[str, object], reason: str | None) -> None:
    assert host.missing(requires, MACHINE) == reason


def test_this_machine() -> None:
    here = host.host()
    assert here.os in ("linux", "macos") and here.arch and here.cpu
    assert here.features and 1 <= here.cores and 0 < here.memory_available <= here.memory_total
    assert host.missing({"os": here.os, "arch": here.arch, "features": list(here.features)}) is None


def test_limits_of_the_cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (inner / "cpu.max").write_text("150000 100000\n")
    (inner / "memory.max").write_text("1000000\n")
    (inner / "memory.current").write_text("900000\n")
    (inner / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    monkeypatch.setattr(host, "_cgroups", lambda: [inner, tmp_path])
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert host.cores() == 2
    assert host.memory() == (1000000, 150000)


def test_threads_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    assert host.threads() == host.cores()
    for text, threads in ((" 3 ", 3), ("", host.cores()), ("4096", 4096)):
        monkeypatch.setenv("TVM_NUM_THREADS", text)
        assert host.threads() == threads
    for text in ("0", "-1", "two", "4097", "1.5", "9" * 5000):
        monkeypatch.setenv("TVM_NUM_THREADS", text)
        with pytest.raises(UsageError, match="TVM_NUM_THREADS") as raised:
            host.threads()
        assert raised.value.need == "a number from 1 to 4096"


def test_macos_words(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "hw.optional.arm.FEAT_BF16": "1",
        "hw.optional.arm.FEAT_SME": "0",
        "hw.optional.AdvSIMD": "1",
        "machdep.cpu.brand_string": "Apple M4",
        "machdep.cpu.features": "SSE4.1 AVX1.0",
    }
    monkeypatch.setattr(host, "_sysctl", lambda: table)
    assert host._cpu_macos() == ("Apple M4", frozenset({"bf16", "asimd", "sse4_1", "avx"}))


def test_versions() -> None:
    assert host.same_release("0.27.0.post1", "0.27.0")
    assert not host.same_release("0.27.0", "0.27.1")
    assert not host.same_release("0.27.0", None)
    assert host.installed("no-such-package-at-all") is None
