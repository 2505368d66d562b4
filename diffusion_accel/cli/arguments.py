"""Options that several commands have, declared once, and the bounds of numbers, which the help says and checks use."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown
from diffusion_accel.model_files.names import EMBEDDED

from .settings import DTYPES, LIMITS, Bounds, Settings, at_least

# numbers that only some commands have; those of `settings.LIMITS` are in every one of them
COUNT = at_least(1, 100_000)
BATCH = at_least(1, 1024)
ROUNDS = at_least(1, 1000)
SECONDS = Bounds(1, 10_000_000, "at least 1 and at most 10000000")


def check_range(flag: str, value: float | None, bounds: Bounds) -> None:
    """Raise `ConfigurationError` for a number outside of its bounds."""
    if value is not None and value not in bounds:
        raise ConfigurationError(f"{flag} must be {bounds.allowed(value)}, got {shown(value)}")


def number(text: str, bounds: Bounds, *declarations: str, **options: Any) -> Any:
    """An option for a number, whose help says what is allowed."""
    return typer.Option(*declarations, help=f"{text} ({bounds.short})", **options)


def recommended(key: str) -> str:
    """What stands for a default where the model has the word."""
    return f"{EMBEDDED[Settings.model].settings[key]} with {Settings.model}, else the pipeline's"


Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Embedded name, hub id, folder, or .safetensors file.", show_default=Settings.model
    ),
]
Steps = Annotated[int | None, number("Denoising steps.", LIMITS["steps"], show_default=recommended("steps"))]
GuidanceScale = Annotated[
    float | None,
    number(
        "Classifier-free guidance; 1 switches it off.",
        LIMITS["guidance_scale"],
        show_default=recommended("guidance_scale"),
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(help="ddim, dpm++, euler, unipc, … or a diffusers class.", show_default=recommended("scheduler")),
]
Pixels = Annotated[int | None, number("Pixels.", LIMITS["width"], show_default=recommended("width"))]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, …", show_default="the best one here")]
Dtype = Annotated[str | None, typer.Option(help=", ".join(DTYPES) + ".", show_default=Settings.dtype)]
AllowPickle = Annotated[
    bool | None, typer.Option("--allow-pickle", help="Also load pickled weights, which can run code.")
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own logs.")]
