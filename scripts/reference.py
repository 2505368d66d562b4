#!/usr/bin/env python3
"""Writes docs/reference/api.md, the table of the public names, from their docstrings.

python scripts/reference.py
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import diffusion_accel
from diffusion_accel.registry import FEATURES, feature_class

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "api.md"
HEAD = """# The public names

Everything here is imported from `diffusion_accel` and loaded when it is first used. `help(diffusion_accel.compare)`
says all about a name: shapes, units, ranges and errors. This page is written by `python scripts/reference.py`.

What measures or changes a pipeline takes it and prompts, then the same keywords with the same meaning: `steps`, `seed`,
`guidance_scale`, `height`, `width`, `progress`. A keyword that is not known is refused, with the nearest one.
"""
KINDS = ("verb", "feature", "error", "type")
HEADINGS = {"verb": "Verbs", "feature": "Features", "error": "Errors", "type": "Settings, handles and results"}


def kind_of(value: Any) -> str:
    """Which table a name belongs to."""
    if not isinstance(value, type):
        return "verb"
    if value in {feature_class(name) for name in FEATURES}:
        return "feature"
    return "error" if issubclass(value, Exception) else "type"


def summary(value: Any) -> str:
    """The first sentence of a docstring."""
    text = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    return text.replace("|", "\\|")


def page() -> str:
    """The whole page."""
    values = {name: getattr(diffusion_accel, name) for name in sorted(diffusion_accel.__all__) if name[0] != "_"}
    lines = [HEAD]
    for kind in KINDS:
        named = {name: value for name, value in values.items() if kind_of(value) == kind}
        lines += [f"## {HEADINGS[kind]}", ""]
        if kind == "verb":
            lines += ["| name | what it does | arguments |", "| --- | --- | --- |"]
            calls = {name: ", ".join(inspect.signature(value).parameters) for name, value in named.items()}
            lines += [f"| `{name}` | {summary(value)} | {calls[name]} |" for name, value in named.items()]
        else:
            lines += ["| name | what it is |", "| --- | --- |"]
            lines += [f"| `{name}` | {summary(value)} |" for name, value in named.items()]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
