"""`metadata`: what was written into an image, without loading a model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from diffusion_accel.errors import OutputError
from diffusion_accel.image_files import read_metadata
from diffusion_accel.image_metadata import parse_parameters

from .terminal import say


def metadata(
    file: Annotated[str, typer.Argument(help="A PNG, WebP or JPEG file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
) -> None:
    """Print the settings that an image was made with."""
    text, data = read_metadata(file)
    if text is None and data is None:
        raise OutputError(f"{file} holds no generation settings")
    if as_json:
        settings = {} if text is None else parse_parameters(text)[2]
        typer.echo(json.dumps({"parameters": text, "settings": settings, "diffusion_accel": data}))
        return
    if text is not None:
        say(text, lines=True)
    if data is not None:
        typer.echo(json.dumps(data, indent=2))
