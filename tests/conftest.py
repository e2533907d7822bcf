"""Models and artifacts that several test files share, each made once a session; golden texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Its threads spin at every barrier: on a machine with other work, which the other workers are,
# tiny models took ten times as long.
torch.set_num_threads(1)

Saved = Callable[[str, str, str], tuple[Any, Path]]
Compiled = Callable[[str, str, str], tuple[Any, Any, Any]]
Golden = Callable[[str], None]

SCHEDULES = ("fused", "gather", "loop")
TESTS = Path(__file__).parent
# The longest files, which start first: the last one to end decides how long the whole takes.
LONG = (
    "families/test_families.py",
    "compiler/test_kernels.py",
    "compiler/test_families.py",
    "metal/test_families.py",
    "schedules/test_cuda.py",
    "test_guarantees.py",
)
# Files that use the same session fixtures.
SHARED = {
    "kernels": {f"compiler/test_{n}.py" for n in ("activation", "kernels", "onnxruntime", "route")},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden anew, to be reviewed"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    places = {path: place for place, path in enumerate(LONG)}
    items.sort(key=lambda i: places.get(i.path.relative_to(TESTS).as_posix(), len(LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep on one worker what shares models, artifacts or kernels that are slow to make.

    By the test's name: marks reach xdist (3.8) through an attribute that pytest 9.2 has no more,
    so that with marks every worker made everything.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0].partition("tests/")[2]
            return next((group for group, names in SHARED.items() if path in names), path)

    return ByGroup(config, log)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of families, and how many tests were skipped and why: they checked nothing."""
    for line in _families(terminalreporter.stats):
        terminalreporter.write_line(line)
    skipped = terminalreporter.stats.get("skipped", ())
    for reason, count in Counter(report.longrepr[2] for report in skipped).items():
        terminalreporter.write_line(f"{count} tests SKIPPED: {reason.removeprefix('Skipped: ')}")


def _families(stats: dict[str, list[Any]]) -> list[str]:
    """One line a family: the largest error of each variant against its reference."""
    table: dict[str, dict[str, str]] = {}
    for report in (r for kind in ("passed", "failed") for r in stats.get(kind, ())):
        said = dict(report.user_properties)
        if "family" in said and report.when == "call":
            family, variant = said["family"]
            error = f"ok {said['error']:.1e}" if "error" in said else "FAILED"
            table.setdefault(family, {})[variant] = error
    if not table:
        return []
    lines = [
        f"{family:20}  " + "  ".join(f"{v} {row[v]:10}" for v in sorted(row))
        for family, row in sorted(table.items())
    ]
    return [f"{len(table)} families, two variants, error against the reference:", *lines]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compares a text with tests/golden/<path of the test file>/<test>.txt."""
    folder = request.path.relative_to(TESTS).with_suffix("")
    name = re.sub(r"[^\w.]+", "-", request.node.name).strip("-")
    path = TESTS / "golden" / folder / f"{name}.txt"

    def check(text: str) -> None:
        text = text.rstrip() + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        how = f"if that is meant, run 'pytest --update-golden {request.path}' and review the diff"
        assert path.exists(), f"there is no {path}: {how}"
        assert text == path.read_text(encoding="utf-8"), f"{path} differs: {how}"

    return check


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """(family, variant, dtype) -> (the transformers model, the directory it was saved in)."""
    from tests import models

    made: dict[tuple[str, str, str], tuple[Any, Path]] = {}

    def get(family: str, variant: str, dtype: str) -> tuple[Any, Path]:
        key = (family, variant, dtype)
        if key not in made:
            path = tmp_path_factory.mktemp("-".join(key))
            made[key] = models.tiny(*key, path), path
        return made[key]

    return get


@pytest.fixture(scope="session")
def compiled(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """(family, variant, dtype) -> (transformers model, its float32 twin, loaded artifact).

    All schedules are in the artifact, which lies at `loaded.path` and is not to be changed. One
    thread: two that wait for each other take ms where other workers run, and what threads do
    to a result is tested where it is the question.
    """
    import moec
    from tests import models
    from tests import objects as compiled_once

    objects = compiled_once.Objects(tmp_path_factory.mktemp("objects"))
    made: dict[tuple[str, str, str], Any] = {}

    def get(family: str, variant: str, dtype: str) -> tuple[Any, Any, Any]:
        key = (family, variant, dtype)
        if key not in made:
            model, path = saved(*key)
            out = tmp_path_factory.mktemp("artifact") / "m.moec"
            with pytest.MonkeyPatch.context() as patch:  # other tests build libraries as users do
                compiled_once.install(objects, patch)
                moec.compile(path, out=out, schedules=SCHEDULES)
            twin = model if dtype == "float32" else models.widened(model)
            made[key] = model, twin, moec.load(out, threads=1)
        return made[key]

    return get
