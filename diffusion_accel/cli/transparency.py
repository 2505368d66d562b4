"""Transparent images on the command line: layers and previews of `generate`, and the commands around them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_accel.errors import ConfigurationError, OutputError
from diffusion_accel.io import is_there

from .common_options import Debug
from .settings import Settings, parse_background, refuse_jpeg
from .terminal import say

if TYPE_CHECKING:
    from PIL import Image

_FILES = typer.Argument(metavar="FILE…", help="Images, the lowest first.", show_default=False)


# ------------------------------------------------------------------------------------------- generate
def drawn_layers(settings: Settings) -> tuple[str, ...]:
    """The layers that one image is drawn as; ("",) without transparency."""
    from diffusion_accel.transparency.latent_transparency import LAYERS, LatentTransparency

    feature = settings.features.get("transparent")
    return LAYERS[feature.variant] if isinstance(feature, LatentTransparency) and feature.views != 0 else ("",)


def by_image(images: list[Image.Image], layers: tuple[str, ...]) -> list[list[Image.Image]]:
    """What one call drew, in groups of the layers of an image."""
    return [images[start : start + len(layers)] for start in range(0, len(images), len(layers))]


def layer_path(path: Path, layer: str, settings: Settings) -> Path | None:
    """Where a layer of the image `path` is written; None: it is not asked for."""
    layers = drawn_layers(settings)
    if settings.layers is not None and layer not in [name.strip() for name in settings.layers.split(",")]:
        return None
    return path if len(layers) == 1 else path.with_name(f"{path.stem}-{layer}{path.suffix}")


def extra_paths(path: Path, settings: Settings) -> list[Path]:
    """Every other file that is written for the image `path`."""
    layers = drawn_layers(settings)
    found = [file for layer in layers if (file := layer_path(path, layer, settings)) not in (None, path)]
    if settings.preview is not None:
        found.append(path.with_name(f"{path.stem}-preview.png"))
    if {"fg", "bg"} <= set(layers):
        found.append(path.with_name(f"{path.stem}-composite.png"))
    return [file for file in found if file is not None]


def as_written(image: Image.Image, settings: Settings) -> Image.Image:
    """The image as its file holds it."""
    if not settings.premultiplied or image.mode != "RGBA":
        return image
    from diffusion_accel.compositing import premultiplied

    return premultiplied(image)


def save_previews(path: Path, layers: dict[str, Image.Image], settings: Settings) -> list[tuple[Path, str]]:
    """Write what `extra_paths` names besides layers; returns the files, each with what it shows."""
    from diffusion_accel.compositing import over

    from .output import save_image

    written = []
    if settings.preview is not None and "fg" in layers:
        file = path.with_name(f"{path.stem}-preview.png")
        save_image(_over(layers["fg"], settings.preview), file)
        written.append((file, f"over {settings.preview}"))
    if {"fg", "bg"} <= set(layers):
        file = path.with_name(f"{path.stem}-composite.png")
        save_image(over(layers["fg"], layers["bg"]), file)
        words = "fg over bg"
        if "blend" in layers:
            words += f"; recomposition error against blend {_recomposition(layers):.4f}"
        written.append((file, words))
    return written


def _over(image: Image.Image, background: str) -> Image.Image:
    from diffusion_accel.compositing import checkerboard, over

    return over(image, parse_background(background) or checkerboard(image.size))


def _recomposition(layers: dict[str, Image.Image]) -> float:
    from diffusion_accel.transparency.images import rgba_tensor
    from diffusion_accel.transparency.layers import recomposition_error

    tensors = [rgba_tensor(layers[name]) for name in ("bg", "fg", "blend")]
    below, above, blend = (t for t in tensors if t is not None)
    pairs = [(one[:, :3], one[:, 3:]) for one in (below, above)]
    return float(recomposition_error(pairs, blend[:, :3])[0])


# ------------------------------------------------------------------------------------------- commands
def _opened(file: str) -> Image.Image:
    """An image file as RGBA. Raises `OutputError` for a missing one, `ConfigurationError` for one that is none."""
    from diffusion_accel.images import open_image

    if not is_there(Path(file)):
        raise OutputError(f"no such file: {file}")
    return open_image(file, "RGBA")


def compose(
    layers: Annotated[list[str], _FILES],
    output: Annotated[str, typer.Option("--output", "-o", help="File to write.")],
    background: Annotated[
        str | None, typer.Option(metavar="checkerboard|COLOUR|FILE", help="Behind all; without it alpha is kept.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    debug: Debug = False,
) -> None:
    """Stack images with transparency into one."""
    from .output import check_fits, plan_outputs, save_image

    path = plan_outputs(output, [[0]], [None], overwrite)[0][0]
    if background is None:
        refuse_jpeg(path, "-o ")
    if background is not None:
        parse_background(background)
    from PIL import Image

    images = [_opened(file) for file in layers]
    made = images[0]
    for file, image in zip(layers[1:], images[1:], strict=True):
        if image.size != made.size:
            raise ConfigurationError(
                f"{file} has {image.width}x{image.height} pixels, {layers[0]} {made.width}x{made.height}; layers must "
                "have one size"
            )
        made = Image.alpha_composite(made, image)
    check_fits([path], *made.size)
    save_image(made if background is None else _over(made, background), path)
    say(str(path))


def cutout(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image with transparency.", show_default=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="Embedded name, hub id or folder.")] = "sticker",
    output: Annotated[str, typer.Option("--output", "-o", help="File to write.")] = "cutout.png",
    weights: Annotated[str, typer.Option(help="Transparency weights; beside the model if not given.")] = "",
    views: Annotated[
        int | None, typer.Option(help="Sides from which the decoder looks: 8, 4 or 1; as recommended if not given.")
    ] = None,
    refine: Annotated[
        int | None, typer.Option(help="Steps that refine the latents; as recommended if not given.")
    ] = None,
    preview: Annotated[
        str | None, typer.Option(metavar="checkerboard|COLOUR|FILE", help="Also write it over this.")
    ] = None,
    premultiplied: Annotated[bool, typer.Option("--premultiplied", help="Write colours multiplied by alpha.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    debug: Debug = False,
) -> None:
    """Send an image with alpha through a model's latents and back: what its transparency can hold."""
    from diffusion_accel.transparency.latent_transparency import LatentTransparency

    from .output import check_free, plan_outputs, save_image
    from .settings import find_model

    path = plan_outputs(output, [[0]], [None], overwrite)[0][0]
    refuse_jpeg(path, "-o ")
    beside = path.with_name(f"{path.stem}-preview.png")
    if preview is not None:
        parse_background(preview)
        check_free([beside], overwrite)
    if views == 0:
        raise ConfigurationError("--views must be 8, 4 or 1, got 0")
    feature = LatentTransparency(weights=weights, views=views, refine=refine, strength=0.0)
    picture = _opened(image)
    source = find_model(model)
    import diffusers
    import transformers

    from diffusion_accel.compositing import premultiplied as multiplied
    from diffusion_accel.pipelines.loading import load_pipeline

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    made, alpha_psnr = _round_trip(load_pipeline(source), feature, picture)
    save_image(multiplied(made) if premultiplied else made, path)
    say(f"{path}  alpha PSNR {alpha_psnr:.1f} dB")
    if preview is not None:
        save_image(_over(made, preview), beside)
        say(f"{beside}  over {preview}")


def _round_trip(pipe: Any, feature: Any, image: Image.Image) -> tuple[Image.Image, float]:
    """The image encoded, decoded by the VAE, and read again; and how near alpha is, dB."""
    import torch
    import torch.nn.functional as F

    from diffusion_accel.errors import UnsupportedPipelineError
    from diffusion_accel.measure.fidelity import psnr
    from diffusion_accel.transparency.attachment import load
    from diffusion_accel.transparency.codec import decode_rgba, encode_rgba, refine_latents
    from diffusion_accel.transparency.images import rgba_tensor, to_pil

    reason = feature.supports(pipe)
    if reason:
        raise UnsupportedPipelineError(f"cutout cannot use this model: {reason}")
    loaded = load(feature, pipe)
    if loaded.encoder is None or loaded.decoder is None:
        raise UnsupportedPipelineError("cutout needs an encoder, which these weights do not have")
    rgba = rgba_tensor(image)
    assert rgba is not None
    height, width = rgba.shape[-2:]
    factor = loaded.encoder.factor
    around = (0, -width % factor, 0, -height % factor)
    whole = F.pad(rgba, around, mode="replicate") if any(around) else rgba
    with torch.no_grad():
        known = whole[:, :3], whole[:, 3:]
        z = encode_rgba(pipe.vae, loaded.encoder, *known)
        z = refine_latents(lambda z: pipe.vae.decode(z).sample, loaded.decoder, z, *known, loaded.refine)
        rgb, alpha = decode_rgba(loaded.decoder, pipe.vae.decode(z).sample, z, loaded.views)
    made = torch.cat([rgb, alpha], 1)[..., :height, :width]
    return to_pil(made)[0], float(psnr(rgba[:, 3:], made[:, 3:].cpu())[0])
