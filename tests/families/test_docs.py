"""docs/families.md says what the family files say, and the example of a new row is a real one."""

from __future__ import annotations

import pathlib

from moec.frontend import builtin
from moec.frontend.families_doc import page

ROOT = pathlib.Path(__file__).parents[2]


def test_the_page_is_not_stale() -> None:
    again = "python -m moec.frontend.families_doc docs/families.md"
    assert (ROOT / "docs" / "families.md").read_text(encoding="utf-8") == page(), again


def test_every_family_is_on_the_page() -> None:
    text = page()
    for family in builtin():
        assert f"\n## {family.family}\n" in text
        assert all(name in text for name in (*family.model_types, *family.wrappers))


def test_the_example_is_a_real_file() -> None:
    text = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8")
    diff = text.split("+++ b/moec/frontend/families/axk2.toml\n")[1].split("```")[0]
    lines = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    file = ROOT / "moec" / "frontend" / "families" / "axk2.toml"
    assert "\n".join(lines) + "\n" == file.read_text(encoding="utf-8")
