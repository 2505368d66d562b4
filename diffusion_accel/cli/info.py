"""`info`: versions, devices and engines."""

from __future__ import annotations

import json
import platform
from importlib import metadata as packages
from typing import Any

import typer

from diffusion_accel import __version__
from diffusion_accel.compiled.engines import ENGINES

from .common_options import AsJson
from .terminal import say

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "pillow", "peft", "xformers", "openvino")


def collect() -> dict[str, Any]:
    """Versions of the libraries (None: not installed), what torch can compute on, and engines with theirs."""
    import torch  # heavy

    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = packages.version(name)
        except packages.PackageNotFoundError:
            found[name] = None
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    engines = {name: engine.missing() for name, engine in ENGINES.items() if name != "eager"}
    return {
        "diffusion-accel": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": found,
        "devices": devices,
        "engines": {
            name: {"missing": missing, "devices": [] if missing else ENGINES[name].devices()}
            for name, missing in engines.items()
        },
    }


def info(as_json: AsJson = False) -> None:
    """Print versions, devices and engines, for bug reports."""
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name in ("diffusion-accel", "python", "platform"):
        say(f"{name}: {facts[name]}")
    for name, version in facts["packages"].items():
        say(f"{name}: {version or 'not installed'}")
    say("devices: " + ", ".join(facts["devices"]))
    for name, engine in facts["engines"].items():
        say(f"engine {name}: " + (engine["missing"] or ", ".join(engine["devices"]) or "there"))
