"""`evaluate`: how well a model draws, plain or accelerated."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import diffusion_accel as api
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.image_files import SUFFIXES, is_image_file
from diffusion_accel.io import is_there
from diffusion_accel.outputs import check_free, output_path

from .common_options import (
    AllowPickle,
    AsJson,
    Batch,
    Device,
    Dtype,
    GuidanceScale,
    Model,
    Overwrite,
    Pixels,
    Quiet,
    RecipeOption,
    Scheduler,
    Seed,
    Steps,
    count_option,
    in_panels,
    settings_of,
)
from .feature_flags import with_feature_flags
from .settings import check_features
from .terminal import Bar, console, say

LEAST = 4  # images: distances between distributions need a few

_PANELS = {
    "What is drawn": "model data count steps guidance_scale scheduler width height seed batch",
    "Output": "grid overwrite as_json quiet",
    "Machine": "device dtype recipe allow_pickle",
}


@with_feature_flags
@in_panels(_PANELS)
def evaluate(
    model: Model = None,
    data: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Captioned images; without it the embedded reference.")
    ] = None,
    count: Annotated[int, count_option(LEAST, "Images to draw of each part, trained and held out.")] = 64,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    scheduler: Scheduler = None,
    width: Pixels = None,
    height: Pixels = None,
    seed: Seed = 100,
    batch: Batch = 16,
    grid: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the drawn images as one PNG.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Dtype = None,
    recipe: RecipeOption = None,
    allow_pickle: AllowPickle = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    **features: str | None,
) -> None:
    """Measure how well a model draws: distances, retrieval and, with --data, the validation loss by timestep."""
    options = locals()
    if data is not None and not is_there(Path(data), "dir"):
        raise ConfigurationError(f"--data: no such folder: {data}")
    if grid is not None:
        check_free([output_path(grid, "--grid", SUFFIXES)], overwrite)
        if not is_image_file(grid, "--grid"):
            raise ConfigurationError(f"--grid {grid} must be an image file: {', '.join(SUFFIXES)}")
    settings, source = settings_of(options, features)
    check_features(settings, settings.steps, source)

    from .session import check_machine, open_for  # heavy: torch, diffusers

    pipe = open_for(settings, source, check_machine(settings))
    with closing(Bar(quiet)) as bar:
        found = api.evaluate(
            pipe,
            data=data,
            count=count,
            steps=settings.steps,
            seed=seed,
            guidance_scale=settings.guidance_scale,
            height=settings.height,
            width=settings.width,
            batch=batch,
            progress=bar,
        )
    if grid is not None:
        found.write_grid(grid)
    result = {**found.to_dict(), "model": source.name}
    if as_json:
        typer.echo(json.dumps(result))
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """The tables."""
    terminal = console()
    title = f"{result['model']}, against {result['real']} real images ({result['data']})"
    parts = [split for split in ("train", "heldout") if split in result]
    table = Table("", *({"train": "trained", "heldout": "held out"}[part] for part in parts), title=title)
    table.add_row("images drawn", *(str(result[part]["n"]) for part in parts))
    table.add_row("Fréchet distance", *(f"{result[part]['frechet']:.2f}" for part in parts))
    for name in ("precision", "recall"):
        table.add_row(name, *(f"{result[part][name]:.1%}" for part in parts))
    words = {
        "style_top1": "right concept, same style",
        "style_top5": "… among the first five",
        "any_top1": "right concept, any style",
        "any_top5": "… among the first five",
        "nearest_style": "nearest has the asked style",
    }
    for key, text in words.items():
        table.add_row(text, *(f"{result[part]['retrieval'][key]:.1%}" for part in parts))
    terminal.print(table)
    losses = [part for part in parts if "loss" in result[part]]
    if losses:
        bins = len(result[losses[0]]["loss"]["bins"])
        curve = Table("timesteps", *({"train": "trained", "heldout": "held out"}[part] for part in losses))
        for i in range(bins):
            low, high = i * 1000 // bins, (i + 1) * 1000 // bins - 1
            curve.add_row(f"{low}–{high}", *(f"{result[part]['loss']['bins'][i]:.4f}" for part in losses))
        curve.add_row("mean", *(f"{result[part]['loss']['mean']:.4f}" for part in losses))
        curve.title = "validation loss"
        terminal.print(curve)
    if "no_loss" in result:
        say(f"no validation loss: {result['no_loss']}")
    say(
        "Fréchet distance, precision and recall are measured on the features of a small classifier of stickers; "
        "they are no FID and compare only with numbers of the same count."
    )
