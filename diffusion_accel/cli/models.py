"""`models`: what ships inside."""

from __future__ import annotations

import dataclasses
import json

import typer

from diffusion_accel.model_files.names import EMBEDDED

from .common_options import AsJson
from .terminal import say


def models(as_json: AsJson = False) -> None:
    """List the embedded models; any hub id, folder or .safetensors file works as well."""
    if as_json:
        typer.echo(
            json.dumps(
                [
                    {**dataclasses.asdict(m), "settings": m.settings, "path": str(m.path), "bytes": m.size}
                    for m in EMBEDDED.values()
                ]
            )
        )
        return
    for m in EMBEDDED.values():
        settings = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in m.settings.items())
        say(f"{m.name}  ({m.size / 1e6:.0f} MB)  {m.summary}")
        say(f"  recommended: {settings}")
        say(f"  try: diffusion-accel generate {json.dumps(m.example)} --model {m.name}")
        say(f"  licence: {m.licence}")
        say(f"  model card: {m.path / 'README.md'}")
