"""`features`: the registry as a table."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from diffusion_accel.registry import all_features

from .common_options import AsJson
from .terminal import say


def rows() -> list[dict[str, Any]]:
    """Every feature with its keys, defaults and documentation."""
    return [
        {
            "name": cls.name,
            "flag": cls.flag(),
            "summary": cls.summary,
            "paper": cls.paper,
            "conflicts": sorted(cls.conflicts),
            "keys": [
                {"key": f.name, "default": f.default, "meaning": f.metadata["doc"]} for f in dataclasses.fields(cls)
            ],
        }
        for cls in all_features()
    ]


def markdown() -> str:
    """The table for the documentation."""
    lines = ["| flag | key | default | meaning |", "| --- | --- | --- | --- |"]
    for row in rows():
        lines.append(f"| `{row['flag']}` | | | {row['summary']}; {row['paper']} |")
        lines += [f"| | `{k['key']}` | `{json.dumps(k['default'])}` | {k['meaning']} |" for k in row["keys"]]
    return "\n".join(lines)


def features(
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
) -> None:
    """List what can be switched on, with all keys."""
    if as_json:
        typer.echo(json.dumps(rows()))
    elif as_markdown:
        typer.echo(markdown())
    else:
        for row in rows():
            say(f"{row['flag']}  {row['summary']}")
            say(f"  source: {row['paper']}")
            for k in row["keys"]:
                say(f"  {k['key']}={json.dumps(k['default']).strip(chr(34))}  {k['meaning']}")
            if row["conflicts"]:
                say(f"  cannot be combined with: {', '.join(row['conflicts'])}")
