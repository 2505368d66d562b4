"""`estimate`: what patch parallelism would bring on so many devices, before anybody buys or rents them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.table import Column, Table

import diffusion_accel as api
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.generation.request import LIMITS, at_least

from .common_options import BATCH, Batch, bounded, in_panels, number, one_of
from .feature_flags import parse_feature
from .settings import DTYPES
from .terminal import console, say

if TYPE_CHECKING:
    from diffusion_accel import Estimate

SIDE = at_least(8, 32_768)

_PANELS = {
    "What is drawn": "model width height steps batch guidance_scale decode dtype",
    "On which devices": "devices patch_parallel machine link threads",
}


@in_panels(_PANELS)
def estimate(
    model: Annotated[
        str, typer.Option("--model", "-m", help="sd15 or sdxl (architectures), embedded name, folder, or hub id.")
    ] = "sdxl",
    devices: Annotated[str, typer.Option(metavar="N,N,…", help="How many devices, 1 to 64.")] = "1,2,4,8",
    width: Annotated[int, number("Pixels.", SIDE)] = 1024,
    height: Annotated[int, number("Pixels.", SIDE)] = 1024,
    steps: Annotated[int, number("Denoising steps.", LIMITS["steps"])] = 50,
    batch: Batch = 1,
    guidance_scale: Annotated[
        float, number("Classifier-free guidance, which doubles the batch; 1 switches it off.", LIMITS["guidance_scale"])
    ] = 7.5,
    decode: Annotated[bool, typer.Option(help="With the VAE's decoder.")] = True,
    patch_parallel: Annotated[
        str,
        typer.Option(metavar="KEY=VALUE,…", help="Settings of the feature, such as mode=partial,cfg_parallel=true."),
    ] = "",
    machine: Annotated[
        str, typer.Option(help="a100, h100, rtx4090, or here: times are measured on this machine.")
    ] = "a100",
    link: Annotated[
        str,
        typer.Option(
            metavar="NAME|GB/S:MICROSECONDS",
            help="nvlink3, nvlink4, pcie4, pcie5, ethernet-100g, ethernet-10g, here, or numbers for one direction.",
        ),
    ] = "nvlink3",
    dtype: Annotated[
        str | None,
        one_of(", ".join(DTYPES) + "; of the U-Net.", DTYPES, show_default="float16, or float32 with --machine here"),
    ] = None,
    threads: Annotated[int, bounded(BATCH, help="CPU threads of a process, with --machine here.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every layer.")] = False,
) -> None:
    """Predict time and traffic of patch parallelism for a model, a size and any number of devices.

    A simulation: what each device computes and sends is that of a real run, times follow from the machine and the link.
    """
    counts = _counts(devices)
    feature = parse_feature("patch_parallel", patch_parallel or "on")
    if not isinstance(feature, api.PatchParallel):
        raise ConfigurationError("--patch-parallel off leaves nothing to plan")
    found = api.estimate(
        model,
        devices=counts,
        steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        batch=batch,
        decode=decode,
        patch_parallel=feature,
        machine=machine,
        link=link,
        dtype=dtype,
        threads=threads,
    )
    if as_json:
        typer.echo(json.dumps(found.rows(layers=True), indent=1))
    else:
        _show(found, f"machine {machine}", f"link {link}")


def _counts(devices: str) -> list[int]:
    try:
        counts = sorted({int(word) for word in devices.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1 or counts[-1] > 64:
        raise ConfigurationError(f"--devices {devices!r} is not allowed; give numbers from 1 to 64, such as 1,2,4,8")
    return counts


def _show(found: Estimate, machine: str, link: str) -> None:
    def seconds(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"

    def megabytes(value: int | None) -> str:
        return "–" if value is None else f"{value / 1e6:.1f}"

    heads = ("devices", "image", "faster", "exact", "later", "MB", "MB later", "hidden", "VAE")
    table = Table(*(Column(head, no_wrap=True) for head in heads), box=SIMPLE, padding=(0, 1, 0, 0))
    for row in found.rows():
        times = [seconds(row[name]) for name in ("exact_step_s", "stale_step_s")]
        sent = [megabytes(row[name]) for name in ("exact_step_bytes", "stale_step_bytes")]
        hidden = "–" if row["hidden"] is None else f"{row['hidden']:.0%}"
        image = seconds(row["picture_s"]), f"{row['speedup']:.2f}"
        table.add_row(str(row["devices"]), *image, *times, *sent, hidden, seconds(row["decoding_s"]))
    exact = found.exact_steps
    console().print(table)
    say(
        f"{machine}, {link}; mode {found.settings.mode}; an image: {exact} exact steps, {found.steps - exact} later "
        "ones, the VAE; faster: than the first row; MB: what the busiest device sends in an exact and in a later step; "
        "hidden: share of the messages' time behind computation"
    )
