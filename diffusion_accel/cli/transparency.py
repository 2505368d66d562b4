"""`compose` and `cutout`: images with transparency."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from diffusion_accel.compositing import background_of, premultiplied, stack
from diffusion_accel.errors import ConfigurationError, OutputError
from diffusion_accel.generation.outputs import over_background, plan_file
from diffusion_accel.image_files import check_fits, check_holds_alpha, save_image
from diffusion_accel.images import open_image
from diffusion_accel.io import is_there
from diffusion_accel.model_files.names import find_model
from diffusion_accel.outputs import check_free
from diffusion_accel.transparency.latent_transparency import LatentTransparency

from .common_options import Overwrite
from .terminal import say

_FILES = typer.Argument(metavar="FILE…", help="Images, the lowest first.", show_default=False)


def _opened(file: str) -> Image.Image:
    """An image file as RGBA. Raises `OutputError` for a missing one, `ConfigurationError` for one that is none."""
    if not is_there(Path(file)):
        raise OutputError(f"no such file: {file}")
    return open_image(file, "RGBA")


def compose(
    layers: Annotated[list[str], _FILES],
    output: Annotated[str, typer.Option("--output", "-o", help="File to write.")],
    background: Annotated[
        str | None, typer.Option(metavar="checkerboard|COLOUR|FILE", help="Behind all; without it alpha is kept.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Stack images with transparency into one."""
    path = plan_file(output, overwrite, "-o")
    if background is None:
        check_holds_alpha(path, "-o ")
    else:
        background_of(background)
    made = stack([_opened(file) for file in layers], layers)
    check_fits(path, *made.size)
    save_image(made if background is None else over_background(made, background), path)
    say(str(path))


def cutout(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image with transparency.", show_default=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="Embedded name, hub id or folder.")] = "sticker",
    output: Annotated[str, typer.Option("--output", "-o", help="File to write.")] = "cutout.png",
    weights: Annotated[str, typer.Option(help="Transparency weights.", show_default="beside the model")] = "",
    views: Annotated[
        int | None, typer.Option(help="Sides from which the decoder looks: 8, 4 or 1.", show_default="as recommended")
    ] = None,
    refine: Annotated[
        int | None, typer.Option(help="Steps that refine the latents.", show_default="as recommended")
    ] = None,
    preview: Annotated[
        str | None, typer.Option(metavar="checkerboard|COLOUR|FILE", help="Also write it over this.")
    ] = None,
    multiplied: Annotated[bool, typer.Option("--premultiplied", help="Write colours multiplied by alpha.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Send an image with alpha through a model's latents and back: what its transparency can hold."""
    path = plan_file(output, overwrite, "-o")
    check_holds_alpha(path, "-o ")
    beside = path.with_name(f"{path.stem}-preview.png")
    if preview is not None:
        background_of(preview)
        check_free([beside], overwrite)
    if views == 0:
        raise ConfigurationError("--views must be 8, 4 or 1, got 0")
    feature = LatentTransparency(weights=weights, views=views, refine=refine, strength=0.0)
    given = _opened(image)
    source = find_model(model)
    from diffusion_accel.generation.cutout import round_trip  # heavy: torch

    from .session import load_plain  # heavy: torch, diffusers

    made, alpha_psnr = round_trip(load_plain(source), feature, given)
    save_image(premultiplied(made) if multiplied else made, path)
    say(f"{path}  alpha PSNR {alpha_psnr:.1f} dB")
    if preview is not None:
        save_image(over_background(made, preview), beside)
        say(f"{beside}  over {preview}")
