"""moec selftest: compile small layers for a target, run every schedule here, print a receipt."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, host, target
from ..errors import TargetError
from ..quickstart import made, runs
from ..runtime import load
from ..runtime.devices import open_device
from .layers import LAYERS

if TYPE_CHECKING:
    from ..cli.console import Console

TOKENS = (1, 5, 40, 130)
_SPEED = "qwen3_moe, 201 MB"  # the only layer that is large enough for its times to mean something
_DEVICES = {"cpu": "cpu", "metal": "metal:0"}


def main(name: str, console: Console, *, speed: bool = True, as_json: bool = False) -> int:
    """Check and time every schedule of target `name` on this machine; 0 when all are right.

    Small layers are checked against float64 at each T of TOKENS; with `speed` the layer of
    the quickstart is checked and timed too. Prints a receipt: versions, machine, one line a
    result. Raises CheckFailed when a result is wrong, TargetError for a target that has no
    self test or that this machine cannot run (before anything is compiled), and what compiling
    and loading raise, before them UsageError for a TVM_NUM_THREADS that is no number of threads.
    """
    host.threads()  # raises: not after minutes of compiling
    resolved = target.resolve(name)
    device = _DEVICES.get(resolved.kind)
    if device is None:
        raise TargetError(
            f"there is no self test for {resolved.name}",
            need="cpu or metal",
            hint="tests/gpu in moec's sources checks an NVIDIA GPU",
        )
    _demand_machine(resolved, device)
    with tempfile.TemporaryDirectory(prefix="moec-selftest-") as folder:
        results = []
        for layer in LAYERS:
            path = Path(folder) / layer.name
            path.mkdir()
            layer.write(path)
            label = f"{layer.name}, {layer.config['dtype']}: {layer.reaches}"
            results.append((label, _measure(path, name, device, TOKENS, console)))
        if speed:
            path = Path(folder) / "quickstart"
            path.mkdir()
            made.write(path)
            results.append((_SPEED, _measure(path, name, device, runs.TOKENS, console)))
    facts = _facts(resolved.name, device)
    if as_json:
        layers = [{"layer": label, "rows": [r.to_json() for r in rows]} for label, rows in results]
        console.json({**facts, "layers": layers})
    else:
        console.data(_receipt(facts, results))
    runs.demand_right([(f"{label}, ", row) for label, rows in results for row in rows])
    return 0


def _demand_machine(resolved: target.Target, device: str) -> None:
    from ..schedules import backend

    reason = host.missing(backend(resolved.kind).requires(resolved))
    if reason is not None:
        metal = resolved.kind == "metal"
        raise TargetError(
            f"the self test of {resolved.name} runs on the machine itself: {reason}",
            need="a Mac with Apple silicon" if metal else None,
            hint="run it there; tests/metal in moec's sources runs these kernels on an emulator"
            if metal
            else "without -t it tests this machine",
        )
    open_device(device)


def _measure(
    path: Path, name: str, device: str, tokens: tuple[int, ...], console: Console
) -> list[runs.Row]:
    from .. import compiler
    from ..frontend import read_model
    from ..schedules import backend

    out = path.with_suffix(".moec")
    console.progress(f"{path.name}: compiling for {name}")
    block = read_model(path).blocks[0]
    own = backend(target.resolve(name).kind)
    compiler.compile(
        path, target=name, out=out, layers=[block.layer], schedules=tuple(own.schedules)
    )
    loaded = load(out, device=device)[block.layer]

    def progress(text: str) -> None:
        console.progress(f"{path.name}: {text}")

    return runs.measure_all(str(path), block, loaded, progress, tokens)


def _facts(name: str, device: str) -> dict[str, Any]:
    machine = host.host()
    return {
        "moec": __version__,
        "apache-tvm": host.installed("apache-tvm"),
        "target": name,
        "device": device,
        "system": f"{machine.os} {platform.release()} {machine.arch}",
        "mac": platform.mac_ver()[0] or None,
        "cpu": machine.cpu,
        "cores": machine.cores,
    }


def _receipt(facts: dict[str, Any], results: list[tuple[str, list[runs.Row]]]) -> str:
    """At most 80 columns wide."""
    lines = [f"{key.ljust(10)}  {value}" for key, value in facts.items() if value is not None]
    for label, rows in results:
        lines += ["", label, f"  {'schedule':10}{'T':>5}{'time':>12}{'error':>10}{'allowed':>10}"]
        for row in rows:
            verdict = "ok" if row.ok else "WRONG"
            lines.append(
                f"  {row.schedule:10}{row.tokens:5}{row.seconds * 1e3:9.3f} ms"
                f"{row.error:10.1e}{row.allowed:10.1e}  {verdict}"
            )
    right = sum(row.ok for _, rows in results for row in rows)
    lines += ["", f"{right} of {sum(len(rows) for _, rows in results)} results right."]
    return "\n".join(lines)
