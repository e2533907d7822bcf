"""docs/families.md from the family files: `python -m moec.frontend.families_doc docs/families.md`.

Everything on that page is read from families/*.toml; a test fails when the page is stale.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from .family import Family, builtin, common

_HEAD = """\
# Model families

Made by `python -m moec.frontend.families_doc docs/families.md` from
`moec/frontend/families/*.toml`; do not edit. How to add one is said in
[adding-a-family.md](adding-a-family.md).

Names in code style are entries of config.json. E experts, I intermediate, H hidden, F width of
the shared expert, M latent width; `[E,H,2I]` is the order of the axes on disk.
"""
_ROUTER = (
    "score", "logits_dtype", "logit_bias", "logit_scale", "logit_cap", "selection",
    "selection_bias", "groups", "weight_source", "renorm", "renorm_epsilon", "renorm_p", "scale",
    "scale_on", "per_expert_scale", "global_scale", "always", "weights_dtype", "apply_to",
)  # fmt: skip


def page() -> str:
    """The whole page."""
    rows = builtin()
    lines = [_HEAD, f"{len(rows)} families:", ""]
    lines += ["| family | model types | example | router | shared expert |",
              "|---|---|---|---|---|"]  # fmt: skip
    lines += [_summary(family) for family in rows]
    lines += ["", "Refused by name:", ""]
    lines += [f"- `{name}`: {reason}" for name, reason in common().refused.items()]
    for family in rows:
        lines += ["", *_details(family)]
    return "\n".join(lines) + "\n"


def _summary(family: Family) -> str:
    router = family.router
    steps = [_text(router.get("score", "softmax"), family)]
    if router.get("groups"):
        steps.append("groups")
    source = router.get("weight_source", "score")
    steps.append(_text(source, family))
    renorm = _text(router.get("renorm", "none"), family)
    steps += [] if renorm == "none" else [f"/ {renorm}"]
    shared = _text(family.shared.get("intermediate_size"), family) if family.shared else ""
    types = ", ".join([*family.model_types, *family.wrappers])
    return f"| [{family.family}](#{family.family}) | {types} | {family.example} | " + (
        f"{', '.join(steps)} | {shared} |"
    )


def _details(family: Family) -> list[str]:
    lines = [f"## {family.family}", ""]
    lines += [f"{note[0].upper()}{note[1:]}." for note in family.notes]
    lines += [""] if family.notes else []
    config = ", ".join(_entry(name, family) for name in family.config)
    lines.append(f"- config: {config}")
    for name, allowed in family.require.items():
        keys = _keys(name, family)
        lines.append(f"- {keys} must be {' or '.join(map(str, allowed))}")
    lines.append(f"- MoE layers: {_layers(family)}")
    router = [f"{k} {_text(family.router[k], family)}" for k in _ROUTER if k in family.router]
    lines.append(f"- router: {', '.join(router)}")
    for title in ("experts", "activation", "shared", "norms", "spec"):
        table = getattr(family, title)
        if table:
            lines.append(f"- {title}: {_text(table, family)}")
    prefixes = ", ".join(f"`{p}`" if p else "none" for p in family.prefixes)
    lines.append(f"- prefixes: {prefixes}; layers `{family.layer}`")
    lines += [f"- {slot}: {_names(value)}" for slot, value in family.tensors.items()]
    for name, layout in family.layouts.items():
        slots = "; ".join(
            f"{slot} {_names(v)}".replace("{x}", family.block) for slot, v in layout.items()
        )
        lines.append(f"- layout {name}: {slots}")
    return lines


def _names(value: Any) -> str:
    return " or ".join(f"`{v}`" for v in (value if isinstance(value, list) else [value]))


def _keys(name: str, family: Family) -> str:
    return "/".join(f"`{key}`" for key in family.config[name].keys)


def _entry(name: str, family: Family) -> str:
    field = family.config[name]
    if field.required:
        return _keys(name, family)
    return f"{_keys(name, family)} ({'optional' if field.default is None else field.default})"


def _layers(family: Family) -> str:
    cases = []
    for case in family.layers or ({},):
        given = " and ".join(_keys(name, family) for name in case.get("given", []))
        rule = " and ".join(_text(c, family) for c in case.get("all", [])) or "all"
        cases.append(f"with {given}: {rule}" if given else rule)
    return "; else ".join(cases)


def _text(template: Any, family: Family) -> str:
    """A template in words, with the names that config.json uses."""
    if isinstance(template, str) and template.startswith("$"):
        return "the layer" if template == "$layer" else _keys(template[1:], family)
    if isinstance(template, list):
        return f"[{', '.join(_text(t, family) for t in template)}]"
    if not isinstance(template, dict):
        return "none" if template is None else str(template)
    if "if" in template:
        then, test = _text(template["then"], family), _text(template["if"], family)
        return f"{then} if {test} else {_text(template.get('else'), family)}"
    if "map" in template:
        of, to = _text(template["map"], family), template["to"]
        if isinstance(to, str):
            return f"{of} by the table of {to}"
        return " / ".join(f"{_text(v, family)} for {of} {k}" for k, v in to.items())
    for operator, sign in (("product", " * "), ("sum", " + "), ("power", " ^ "), ("less", " < ")):
        if operator in template:
            return sign.join(_text(t, family) for t in template[operator])
    if "first" in template:
        return " or ".join(_text(t, family) for t in template["first"])
    return ", ".join(f"{k} {_part(v, family)}" for k, v in template.items())


def _part(template: Any, family: Family) -> str:
    text = _text(template, family)
    return f"({text})" if isinstance(template, dict) and template else text


def main() -> None:
    """Write the page to the path that is given, or to the standard output."""
    if len(sys.argv) > 1:
        pathlib.Path(sys.argv[1]).write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())


if __name__ == "__main__":
    main()
