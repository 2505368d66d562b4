"""`evaluate`: how well a model draws, plain or accelerated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusion_accel.conditioning import CLASS, class_names, condition_of
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.generation.request import Request
from diffusion_accel.image_files import SUFFIXES, is_image_file
from diffusion_accel.io import is_there
from diffusion_accel.outputs import check_free, output_path

from .common_options import (
    AllowPickle,
    AsJson,
    Batch,
    Debug,
    Device,
    Dtype,
    GuidanceScale,
    Model,
    Overwrite,
    Pixels,
    Quiet,
    Scheduler,
    Seed,
    Steps,
    count_option,
    settings_of,
)
from .feature_flags import with_feature_flags
from .settings import check_features
from .terminal import console, say

LEAST = 4  # images: distances between distributions need a few


@with_feature_flags
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
    allow_pickle: AllowPickle = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
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
    check_features(settings.features, settings.steps, settings.scheduler)

    from .session import check_machine, open_for

    pipe = open_for(settings, source, check_machine(settings))
    result = measure(pipe, source.name, settings, data, count, batch, grid, quiet)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        show(result)


def measure(
    pipe: Any, model: str, settings: Any, data: str | None, count: int, batch: int, grid: str | None, quiet: bool
) -> dict[str, Any]:
    """Draw and measure; see `evaluation.quality`."""
    import torch
    from tqdm import tqdm

    from diffusion_accel.evaluation import quality
    from diffusion_accel.evaluation.classifier import extract, load_classifier
    from diffusion_accel.generation.drawing import draw_tensors, fitted

    classifier = load_classifier()
    pictures = None
    if data is None:
        asked, real = quality.embedded_reference()
    else:
        asked, real, pictures = quality.reference_of(Path(data), classifier)
    if condition_of(pipe) == CLASS:
        asked = quality.of_classes(asked, class_names(pipe))
    keys = "negative_prompt steps guidance_scale width height".split()
    request = Request(prompt="", **{key: getattr(settings, key) for key in keys})
    result: dict[str, Any] = {"model": model, "data": data or "embedded reference", "real": len(real)}
    result["features"] = {name: feature.to_dict() for name, feature in pipe.acceleration.features.items()}
    shown = []
    for split in quality.SPLITS:
        chosen = asked.choose(split, count)
        if len(chosen) < 4:
            continue
        made = []
        for start in tqdm(range(0, len(chosen), batch), desc=split, unit="batch", disable=True if quiet else None):
            part = chosen[start : start + batch]
            generators = [torch.Generator("cpu").manual_seed(settings.seed + start + i) for i in range(len(part))]
            prompts = [asked.captions[i] for i in part]
            images = draw_tensors(pipe, prompts, request, generators)
            made.append(images)
        drawn = torch.cat(made)
        shown.append(drawn)
        values = quality.drawing_quality(extract(classifier, drawn), chosen, asked, real)
        if pictures is not None and quality.not_measurable(pipe) is None:
            values["loss"] = quality.validation_loss(
                pipe, fitted(pipe, pictures(chosen), request), [asked.captions[i] for i in chosen]
            )
        result[split] = {"n": len(chosen), **values}
    if pictures is not None and (reason := quality.not_measurable(pipe)):
        result["no_loss"] = reason
    if grid is not None:
        from diffusion_accel.training.images import save_grid

        save_grid(torch.cat(shown), min(12, sum(map(len, shown))), Path(grid))
    return result


def show(result: dict[str, Any]) -> None:
    """The tables."""
    from rich.table import Table

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
