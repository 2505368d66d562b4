"""`metadata`: what was written into an image, without loading a model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..errors import OutputError
from .arguments import Debug
from .output import read_metadata


def metadata(
    file: Annotated[str, typer.Argument(help="A PNG, WebP or JPEG file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Print the settings that an image was made with."""
    text, data = read_metadata(file)
    if text is None and data is None:
        raise OutputError(f"{file} holds no generation settings")
    if as_json:
        typer.echo(json.dumps({"parameters": text, "diffusion_accel": data}))
        return
    if text is not None:
        typer.echo(text)
    if data is not None:
        typer.echo(json.dumps(data, indent=2))
