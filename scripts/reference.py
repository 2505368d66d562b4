#!/usr/bin/env python3
"""Writes docs/reference: the tables of the public names (api.md) and of the modules (modules.md), from docstrings, and
what the site shows of each name in full (docstrings.md).

python scripts/reference.py
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from typing import Any

import diffusion_accel
from diffusion_accel.registry import FEATURES, feature_class

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "api.md"
MODULES = ROOT / "docs" / "reference" / "modules.md"
DOCSTRINGS = ROOT / "docs" / "reference" / "docstrings.md"
HEAD = """# The public names

Everything here is imported from `diffusion_accel` and loaded when it is first used. `help(diffusion_accel.compare)`
says all about a name: shapes, units, ranges and errors. This page is written by `python scripts/reference.py`.

What measures or changes a pipeline takes it and prompts, then the same keywords with the same meaning: `steps`, `seed`,
`guidance_scale`, `height`, `width`, `progress`. A keyword that is not known is refused, with the nearest one.
"""
DOCSTRINGS_HEAD = """# Every public name in full

Arguments, results, errors, units and ranges. On the [site](../index.md) (`make docs`) each line below is the docstring
of a name; elsewhere `help(diffusion_accel.compare)` says the same. `python scripts/reference.py` writes this page.
"""
MODULES_HEAD = """# The modules

What each file knows, in the words of its own first line. [architecture.md](../architecture.md) says which may import
which. This page is written by `python scripts/reference.py`.
"""
SOURCES = {  # in the order of the floors, the lowest first; the other packages follow
    "the core": "diffusion_accel",
    "denoisers": "diffusion_accel/denoisers",
    "model_files": "diffusion_accel/model_files",
    "schedulers": "diffusion_accel/schedulers",
    "recipes": "diffusion_accel/recipes",
    "measure": "diffusion_accel/measure",
    "reuse": "diffusion_accel/reuse",
    "routing": "diffusion_accel/routing",
    "transparency": "diffusion_accel/transparency",
    "parallel": "parallel",
    "parallel.planner": "parallel/planner",
    "compiled": "diffusion_accel/compiled",
    "controlnet": "diffusion_accel/controlnet",
    "training": "diffusion_accel/training",
    "evaluation": "diffusion_accel/evaluation",
    "quant": "quant",
    "quant.ptq": "quant/ptq",
    "tuning": "diffusion_accel/tuning",
    "pipelines": "pipelines",
    "generation": "diffusion_accel/generation",
    "bench": "diffusion_accel/bench",
    "making": "diffusion_accel/making",
    "serving": "diffusion_accel/serving",
    "serving.http": "diffusion_accel/serving/http",
    "serving.http.page": "diffusion_accel/serving/http/page",
    "cli": "diffusion_accel/cli",
}
ELSEWHERE = {
    "LearnedMultistepScheduler": "diffusion_accel.schedulers.learned"
}  # its class names the package, for diffusers
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


def modules_page() -> str:
    """The page of the modules."""
    lines = [MODULES_HEAD]
    for name, folder in SOURCES.items():
        lines += [f"## {name}", ""]
        files = sorted((ROOT / folder).glob("*.py"))
        texts = {f.name: ast.get_docstring(ast.parse(f.read_text(encoding="utf-8"))) or "" for f in files}
        if about := texts.pop("__init__.py", "").split("\n\n")[0].replace("\n", " "):
            lines += [about, ""]
        lines += [f"Folder: `{folder}/`", "", "| file | what it knows |", "| --- | --- |"]
        firsts = {file: text.split("\n\n")[0].replace("\n", " ").replace("|", "\\|") for file, text in texts.items()}
        lines += [f"| `{file}` | {first} |" for file, first in firsts.items() if first]
        lines.append("")
    return "\n".join(lines)


def docstrings_page() -> str:
    """The page that mkdocstrings fills."""
    lines = [DOCSTRINGS_HEAD]
    values = {name: getattr(diffusion_accel, name) for name in sorted(diffusion_accel.__all__) if name[0] != "_"}
    for kind in KINDS:
        named = {name: value for name, value in values.items() if kind_of(value) == kind}
        lines += [f"## {HEADINGS[kind]}", ""]
        homes = {name: ELSEWHERE.get(name, value.__module__) for name, value in named.items()}
        lines += [f"::: {homes[name]}.{value.__qualname__}\n" for name, value in named.items()]
    return "\n".join(lines)


def main() -> int:
    """Write the pages."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    MODULES.write_text(modules_page(), encoding="utf-8")
    DOCSTRINGS.write_text(docstrings_page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
