"""What the documents say about the project and what a machine can check of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moec import cli, errors

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(ROOT.glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
VERBS = ("quickstart", "inspect", "compile", "verify", "run", "selftest", "targets", "env")


def test_links_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (path.parent / link).exists(), (path.name, link)


def test_readme_has_the_two_lines() -> None:
    lines = README.splitlines()
    assert "pip install . && moec quickstart" in lines
    assert "pip install '.[test]' && pytest" in lines  # .ci/run runs this line


def test_readme_names_every_exit_code() -> None:
    kinds = [
        c for c in vars(errors).values() if isinstance(c, type) and c.__module__ == "moec.errors"
    ]
    codes = {0, 130} | {kind.exit_code for kind in kinds}
    assert f"| {' | '.join(map(str, sorted(codes)))} |" in README


def test_flags_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known = {
        "--update-golden",
        "--pdb",
        "--all-files",
        "--help",
        "--version",
        "--strict",
    }  # of others
    for verb in VERBS:
        assert f"moec {verb}" in README
        assert cli.main([verb, "--help"]) == 0
        known |= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for path in DOCUMENTS:
        said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text(encoding="utf-8")))
        assert said <= known, path.name
