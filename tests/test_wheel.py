"""The wheel: it holds the package and its data and nothing else, and its command starts."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moec import __version__

ROOT = Path(__file__).parents[1]


def run(*argv: str | Path) -> str:
    done = subprocess.run([*map(str, argv)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree: a build leaves files in the tree that it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "moec", source / "moec", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source)
    (made,) = folder.glob("*.whl")
    return made


def test_contents(wheel: Path) -> None:
    assert wheel.name == f"moec-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"moec-{__version__}.dist-info"
    held = {name for name in names if not name.startswith(f"{info}/")}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "moec").rglob("*")
        if path.suffix in (".py", ".toml", ".typed", ".metal")
    }
    assert held == wanted
    assert {"moec/py.typed", "moec/frontend/families/_common.toml"} <= held
    assert f"{info}/licenses/LICENSE" in names


def test_installed_command(wheel: Path, tmp_path: Path) -> None:
    """--version, --help and usage errors need none of the dependencies."""
    folder = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel)
    command = folder / "bin" / "moec"
    assert run(command, "--version") == f"moec {__version__}\n"
    assert "quickstart" in run(command, "--help")
    assert run(python, "-m", "moec", "--version") == f"moec {__version__}\n"
    done = subprocess.run([command, "compile"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("moec: error:")
