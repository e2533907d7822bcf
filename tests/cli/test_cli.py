"""The command line: verbs that need no compiler, exit codes, and what goes where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moec import cli
from moec.cli import compile as compile_verb
from moec.cli.console import Console
from moec.errors import BadWeights, TargetError, UsageError
from moec.runtime import cuda
from moec.text import amount, ranges, size
from tests.runtime import fake

Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *argv: str | Path) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def process(*argv: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moec", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        **kwargs,
    )


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    random = np.random.default_rng(0)
    arrays = {
        "x": random.normal(size=(5, fake.H)).astype("f4"),
        "ids": random.integers(0, fake.E, (5, fake.K)).astype("i4"),
        "w": random.random((5, fake.K)).astype("f4"),
    }
    arrays["y"] = fake.experts(arrays["x"], arrays["ids"], arrays["w"])
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    return {name: tmp_path / f"{name}.npy" for name in arrays}


def test_no_verb_and_wrong_verb_are_usage_errors(capsys: Capture) -> None:
    for argv in ((), ("destroy",), ("run",), ("run", "x", "--layer", "a", "--input", "x")):
        code, out, err = call(capsys, *argv)
        assert code == 2 and out == ""
        assert err.startswith("moec: error:") and "--help" in err


def test_help_and_version(capsys: Capture) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for verb in ("quickstart", "inspect", "compile", "verify", "run", "selftest", "targets", "env"):
        assert verb in out
        assert call(capsys, verb, "--help")[0] == 0
    assert call(capsys, "--version")[1].startswith("moec ")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom moec.cli import main\nmain(['--help'])\n"
        "heavy = {'numpy', 'tvm', 'torch', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(3 if heavy else 0)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 0
    )


def test_verify(capsys: Capture, tmp_path: Path) -> None:
    path = fake.copied(tmp_path)
    code, out, err = call(capsys, "verify", path)
    assert code == 0 and err == "" and "4 files" in out and "cpu-fake: runs here" in out
    facts = json.loads(call(capsys, "verify", path, "--json")[1])
    assert facts["ok"] and facts["files"] == 4 and facts["runs_here"] == {"cpu-fake": True}
    assert call(capsys, "verify", path, "--digest", facts["digest"].upper())[0] == 0
    code, out, err = call(capsys, "verify", path, "--digest", "0" * 64)
    assert code == 5 and out == "" and f"digest {'0' * 64}, it has {facts['digest']}" in err
    library = path / "lib" / "cpu-fake.so"
    library.write_bytes(library.read_bytes()[:-1])
    code, out, err = call(capsys, "verify", path)
    lines = err.splitlines()
    assert (code, out, len(lines)) == (5, "", 4)
    assert lines[0].startswith("moec: error: lib/cpu-fake.so has ")
    assert [line[:7] for line in lines[1:]] == ["  in   ", "  need ", "  try  "]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (None, None),
        ("holds code for sm_80, cuda:0 is sm_90", "holds code for sm_80, cuda:0 is sm_90"),
        (TargetError("there is no NVIDIA driver here: libcuda.so.1"),
         "there is no NVIDIA driver here"),
    ],
)  # fmt: skip
def test_code_for_a_gpu_runs_where_the_gpu_takes_it(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Any, why: str | None
) -> None:
    def missing(built_for: str, device: int) -> str | None:
        assert (built_for, device) == ("sm_80", 0)
        if isinstance(said, TargetError):
            raise said
        return said

    monkeypatch.setattr(cuda, "missing", missing)
    path = fake.copied(tmp_path)

    def with_gpu(targets: dict[str, Any]) -> dict[str, Any]:
        own = targets["cpu-fake"]
        return {"cpu-fake": {**own, "requires": {**own["requires"], "gpu": "sm_80"}}}

    fake.edit(path, targets=with_gpu)
    for command in ("inspect", "verify"):
        code, out, err = call(capsys, command, path)
        assert code == 0 and err == "" and f"cpu-fake: {why or 'runs here'}" in out
        facts = json.loads(call(capsys, command, path, "--json")[1])
        here = facts["runs_here"] if command == "verify" else facts["targets"]["cpu-fake"]
        assert here["cpu-fake" if command == "verify" else "runs_here"] is (why is None)


def test_inspect_artifact(capsys: Capture) -> None:
    code, out, _ = call(capsys, "inspect", fake.shared())
    assert code == 0
    assert "b0: E=4 K=2 H=8 I=3 float32, layers 1,3" in out
    assert "experts fused (T < 100000), loop (by name)" in out
    facts = json.loads(call(capsys, "inspect", fake.shared(), "--json")[1])
    assert facts["kind"] == "artifact" and facts["layers"][1] == {"layer": 3, "shape": "b0"}
    functions = facts["targets"]["cpu-fake"]["functions"]["b0"]
    assert functions["experts"][1] == {"schedule": "loop", "tokens": None, "deterministic": True}


def test_inspect_a_damaged_artifact(capsys: Capture, tmp_path: Path) -> None:
    path = fake.copied(tmp_path)
    (path / "manifest.json").write_text("{")
    code, _, err = call(capsys, "inspect", path)
    assert code == 5 and "not valid JSON" in err


def test_inspect_nothing(capsys: Capture, tmp_path: Path) -> None:
    code, out, err = call(capsys, "inspect", tmp_path / "none")
    assert code == 3 and out == "" and err.startswith("moec: error:")


def test_numbers_for_people() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert ranges([]) == ""
    assert [size(n) for n in (5, 1500, 805_306_368)] == ["5 B", "1.5 kB", "805.3 MB"]
    counts = [amount(n) for n in (12_345, 1_000_000, 30_532_122_624, 1_040_000_000_000)]
    assert counts == ["12,345", "1.0 million", "30.5 billion", "1.0 trillion"]


def test_run(capsys: Capture, files: dict[str, Path], tmp_path: Path) -> None:
    out_file = tmp_path / "out.npy"
    routed = ("--function", "experts", "--ids", files["ids"], "--topk-weights", files["w"])
    base = ("run", fake.shared(), "--layer", "3", "--input", files["x"])
    code, out, _ = call(capsys, *base, *routed, "-o", out_file, "--expect", files["y"])
    assert code == 0 and "as expected: relative error" in out
    np.testing.assert_allclose(np.load(out_file), np.load(files["y"]), rtol=1e-5, atol=1e-5)
    facts = json.loads(call(capsys, *base, "--json", "--threads", "1")[1])
    assert facts["results"]["y"]["shape"] == [5, 8] and facts["threads"] == 1
    code, _, err = call(capsys, *base, *routed, "--schedule", "loop", "--expect", files["y"])
    assert code == 5 and "y differs from what was expected in 40 of 40 values" in err
    assert "first at [0, 0]: got 100" in err
    np.save(files["y"], np.load(files["y"]) + 0.01)
    assert call(capsys, *base, *routed, "--expect", files["y"])[0] == 5
    assert call(capsys, *base, *routed, "--expect", files["y"], "--atol", "0.02")[0] == 0
    np.save(files["y"], np.full((5, 8), np.nan))
    assert call(capsys, *base, *routed, "--expect", files["y"], "--atol", "inf")[0] == 5
    np.save(files["y"], np.zeros((5, 9)))
    assert call(capsys, *base, *routed, "--expect", files["y"])[0] == 3
    code, _, err = call(capsys, *base, "--schedule", "gather")
    assert code == 4 and "'gather'" in err


def test_run_route(capsys: Capture, files: dict[str, Path], tmp_path: Path) -> None:
    base = ("run", fake.shared(), "--layer", "1", "--function", "route", "--input", files["x"])
    code, out, _ = call(capsys, *base, "-o", tmp_path / "r.npz")
    assert code == 0 and "topk_ids [5, 2] int32" in out
    assert call(capsys, *base, "--expect", tmp_path / "r.npz")[0] == 0
    with np.load(tmp_path / "r.npz") as saved:
        assert sorted(saved) == ["topk_ids", "topk_weights"]
        np.savez(tmp_path / "s.npz", **{**saved, "topk_ids": saved["topk_ids"] + 1})
    code, _, err = call(capsys, *base, "--expect", tmp_path / "s.npz")
    assert code == 5 and "topk_ids differs" in err
    code, _, err = call(capsys, *base, "-o", tmp_path / "r.npy")
    assert code == 2 and "*.npz" in err
    (tmp_path / "t.npz").write_bytes(b"PK\x03\x04")
    code, _, err = call(capsys, *base, "--expect", tmp_path / "t.npz")
    assert code == 3 and "this is no .npz file" in err


def test_run_bfloat16(capsys: Capture, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3, fake.H)).astype("f4")
    exact = x.astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "x32.npy", x)
    np.save(tmp_path / "x16.npy", exact)
    base = ("run", fake.shared("bfloat16"), "--layer", "1")
    code, _, err = call(capsys, *base, "--input", tmp_path / "x32.npy")
    assert code == 3 and "x32.npy holds float32" in err and "--cast" in err
    for extra in (("x32.npy", "--cast"), ("x16.npy",)):
        inputs = ("--input", tmp_path / extra[0], *extra[1:], "-o", tmp_path / "y.npy")
        assert call(capsys, *base, *inputs)[0] == 0
        y = np.load(tmp_path / "y.npy")
        assert y.dtype == np.float32
        np.testing.assert_array_equal(y, exact.astype("f4"))
    code, _, _ = call(capsys, *base, *inputs, "--expect", tmp_path / "x32.npy")
    assert code == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "there is no such file"),
        (b"", "this is no .npy file"),
        (b"\x93NUMPY\x01\x00\xff\xff", "this is no .npy file"),
        (b"PK\x03\x04", "this is no .npy file"),
        (np.zeros((5, 8)), "x.npy holds float64"),
        (np.zeros((5, 9), "f4"), "x has shape [5, 9]"),
        (np.array([None]), "this is no .npy file"),
    ],
)
def test_run_bad_input(capsys: Capture, files: dict[str, Path], bad: Any, message: str) -> None:
    if bad is None:
        files["x"].unlink()
    elif isinstance(bad, bytes):
        files["x"].write_bytes(bad)
    else:
        np.save(files["x"], bad, allow_pickle=True)
    code, out, err = call(capsys, "run", fake.shared(), "--layer", "1", "--input", files["x"])
    assert (code, out) == (3, "") and message in err


def test_run_casts(capsys: Capture, files: dict[str, Path]) -> None:
    routed = ("--function", "experts", "--ids", files["ids"], "--topk-weights", files["w"])
    base = ("run", fake.shared(), "--layer", "3", "--input", files["x"], *routed, "--cast")
    np.save(files["ids"], np.load(files["ids"]).astype("u1"))
    np.save(files["w"], np.load(files["w"]).astype("f8"))
    np.save(files["x"], np.load(files["x"]).astype("f8"))
    assert call(capsys, *base, "--expect", files["y"])[0] == 0
    for name, array in (("ids", np.zeros((5, 2))), ("ids", np.full((5, 2), 1 << 40))):
        np.save(files[name], array)
        code, _, err = call(capsys, *base)
        assert code == 3 and "cannot be cast to int32" in err
    np.save(files["x"], np.array([["text"]]))
    assert call(capsys, *base)[0] == 3


def test_run_usage(capsys: Capture, files: dict[str, Path], tmp_path: Path) -> None:
    base = ("run", fake.shared(), "--layer", "1", "--input", files["x"])
    for extra, words in (
        (("--function", "experts"), "needs --ids"),
        (("--ids", files["ids"]), "takes no --ids"),
        (("-o", "y.txt"), "is not named *.npy"),
        (("--device", "gpu?:1x"), "is no device"),
        (("-o", tmp_path / "no" / "y.npy"), "cannot write"),
    ):
        code, _, err = call(capsys, *base, *extra)
        assert code == 2 and words in err, err
    assert call(capsys, "run", tmp_path, "--layer", "1", "--input", files["x"])[0] == 2
    code, _, err = call(capsys, "run", fake.shared(), "--layer", "2", "--input", files["x"])
    assert code == 3 and "1, 3" in err
    code, _, err = call(capsys, *base, "--device", "cuda:0")
    assert code == 4 and "cpu-fake (device cpu)" in err


def test_env(capsys: Capture) -> None:
    code, out, _ = call(capsys, "env")
    assert code == 0 and "apache-tvm-ffi" in out and "cores" in out
    facts = json.loads(call(capsys, "env", "--json")[1])
    assert facts["packages"].startswith("ok") and facts["cores"] >= 1


def test_layers_argument() -> None:
    assert compile_verb.parse_layers("0-3,7, 5") == (0, 1, 2, 3, 5, 7)
    for bad in ("", "a", "3-1", "1-", "-1", "1,,2", "9999999"):
        with pytest.raises(UsageError, match="neither a layer nor a range"):
            compile_verb.parse_layers(bad)
    assert compile_verb.default_out("/models/Qwen3-30B/") == "Qwen3-30B.moec"


def test_bugs_are_one_line_and_a_traceback_on_request(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> int:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("moec.cli.verify.run", broken)
    code, out, err = call(capsys, "verify", "x")
    assert (code, out) == (1, "") and err.startswith("moec: error: ZeroDivisionError: by zero\n")
    assert "Traceback" not in err
    code, _, err = call(capsys, "verify", "x", "-v")
    assert code == 1 and "Traceback" in err


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (MemoryError(), 6), (BadWeights("w"), 3)]
)
def test_exit_codes(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def failing(*_: Any) -> int:
        raise error

    monkeypatch.setattr("moec.cli.env.run", failing)
    assert call(capsys, "env")[0] == code


def test_a_reader_that_leaves() -> None:
    code = "import sys; from moec.cli import main; sys.exit(main(['env']))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, env=env, text=True
    )
    os.close(writing)
    assert (run.returncode, run.stderr) == (141, "")


def test_python_m_moec() -> None:
    run = process("verify", fake.shared())
    assert run.returncode == 0 and run.stdout.startswith("ok") and run.stderr == ""
    run = process("verify", "/nowhere")
    assert run.returncode == 2 and run.stdout == "" and "no artifact here" in run.stderr


def test_colour_and_progress_need_a_terminal(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, _, err = call(capsys, "verify", "/nowhere")
    assert "\x1b[1;31mmoec: error:\x1b[0m" in err and "hashing" in err
    monkeypatch.setenv("NO_COLOR", "1")
    _, _, err = call(capsys, "verify", "/nowhere", "-q")
    assert "\x1b" not in err


def test_a_table_is_wrapped_on_a_terminal_only(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("name", "text"), ("a", "many words that do not fit into one line of a terminal")]
    Console().table(rows)
    assert max(map(len, capsys.readouterr().out.splitlines())) > 50
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    Console().table(rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 40
    assert lines[2].startswith("      ") and lines[2].strip() in rows[1][1]


def test_targets_of_every_kind(capsys: Capture) -> None:
    code, out, _ = call(capsys, "targets")
    assert code == 0 and "cuda:sm_90a (= cuda)" in out and "stream16" in out and "metal" in out
    facts = json.loads(call(capsys, "targets", "--json")[1])
    assert {"cuda:sm_90a (= cuda)", "cuda:sm_80", "cuda:compute_80", "metal"} <= {*facts["targets"]}
    for kind in ("cpu", "cuda", "metal"):
        assert {"fused", "gather", "loop"} <= {*facts["schedules"][kind]}
    assert facts["schedules"]["cuda"]["loop"]["tokens"] == "by name only"
