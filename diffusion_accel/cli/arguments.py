"""Options that several commands have, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

from .settings import DTYPES

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Embedded name, hub id, folder, or .safetensors file.")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
GuidanceScale = Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 switches it off.")]
Scheduler = Annotated[str | None, typer.Option(help="ddim, dpm++, euler, unipc, … or a diffusers class.")]
Pixels = Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, …; the best one if not given.")]
Dtype = Annotated[str | None, typer.Option(help=", ".join(DTYPES) + ".")]
AllowPickle = Annotated[
    bool | None, typer.Option("--allow-pickle", help="Also load pickled weights, which can run code.")
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own logs.")]
