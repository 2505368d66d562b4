"""`estimate`: what patch parallelism would bring on so many devices, before anybody buys or rents them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.generation.request import LIMITS, at_least

from .common_options import BATCH, Batch, Debug, bounded, number, one_of
from .feature_flags import parse_feature
from .settings import DTYPES
from .terminal import console, say

if TYPE_CHECKING:
    from diffusion_accel.parallel.patch_parallel import PatchParallel
    from diffusion_accel.parallel.planner.simulate import Link, Machine, Prediction

HERE = "here"
SIDE = at_least(8, 32_768)


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
    dtype: Annotated[str | None, one_of(", ".join(DTYPES) + "; of the U-Net.", DTYPES)] = None,
    threads: Annotated[int, bounded(BATCH, help="CPU threads of a process, with --machine here.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every layer.")] = False,
    debug: Debug = False,
) -> None:
    """Predict time and traffic of patch parallelism for a model, a size and any number of devices.

    A simulation: what each device computes and sends is that of a real run, times follow from the machine and the link.
    """
    from diffusion_accel.parallel.patch_parallel import PatchParallel

    counts = _counts(devices)
    feature = parse_feature("patch_parallel", patch_parallel or "on")
    if not isinstance(feature, PatchParallel):
        raise ConfigurationError("--patch-parallel off leaves nothing to plan")
    if feature.cfg_parallel and (odd := [n for n in counts if n > 1 and n % 2]):
        raise ConfigurationError(f"cfg_parallel needs an even number of devices, not {odd[0]}")
    speed, wire = _machine(machine), _link(link)
    import torch

    from diffusion_accel.model_files.names import find_model
    from diffusion_accel.parallel.planner.architectures import ARCHITECTURES, make_subject
    from diffusion_accel.parallel.planner.recording import record_busiest
    from diffusion_accel.parallel.planner.simulate import predict

    measured = machine == HERE
    if measured:
        torch.set_num_threads(threads)
    subject = make_subject(
        model,
        model if model in ARCHITECTURES else find_model(model).location,
        height,
        width,
        batch,
        guidance_scale != 1,
        decode,
        getattr(torch, dtype or ("float32" if measured else "float16")),
        "cpu" if measured else "meta",
    )
    found = [predict(record_busiest(subject, feature, n), n, speed, wire, steps, feature.warmup) for n in counts]
    if as_json:
        typer.echo(json.dumps([_row(p, found[0], layers=True) for p in found], indent=1))
    else:
        _show(found, feature, steps, f"machine {machine}", f"link {link}")


def _counts(devices: str) -> list[int]:
    try:
        counts = sorted({int(word) for word in devices.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1 or counts[-1] > 64:
        raise ConfigurationError(f"--devices {devices!r} is not allowed; give numbers from 1 to 64, such as 1,2,4,8")
    return counts


def _machine(name: str) -> Machine:
    from diffusion_accel.parallel.planner.simulate import MACHINES

    if name not in MACHINES and name != HERE:
        raise ConfigurationError(f"--machine {name} is not known; use {', '.join(MACHINES)} or {HERE}")
    return MACHINES.get(name, MACHINES["a100"])  # whose rates are not used where times are measured


def _link(text: str) -> Link:
    from diffusion_accel.parallel.planner.simulate import LINKS, Link

    if text in LINKS:
        return LINKS[text]
    if text == HERE:
        from diffusion_accel.parallel.planner.measure_link import measure_link

        return measure_link()
    bandwidth, _, latency = text.partition(":")
    try:
        found = Link(float(bandwidth) * 1e9, float(latency) * 1e-6)
    except ValueError:
        found = Link(0, 0)
    if not (0 < found.bandwidth < 1e15 and 0 <= found.latency < 1):
        raise ConfigurationError(
            f"--link {text!r} is not known; use {', '.join(LINKS)}, {HERE}, or GB/s:microseconds such as 25:20"
        )
    return found


def _row(found: Prediction, first: Prediction, layers: bool = False) -> dict[str, Any]:
    row: dict[str, Any] = {
        "devices": found.devices,
        "picture_s": found.image,
        "speedup": first.image / found.image,
        "exact_step_s": found.exact.seconds,
        "stale_step_s": found.stale.seconds if found.stale else None,
        "decoding_s": found.decoding.seconds,
        "exact_step_bytes": found.exact.sent,
        "stale_step_bytes": found.stale.sent if found.stale else None,
        "hidden": found.hidden,
        "buffer_bytes": found.buffers,
    }
    if layers:
        row["layers"] = {name: {"seconds": s, "bytes": b} for name, (s, b) in found.layers.items()}
    return row


def _show(found: list[Prediction], feature: PatchParallel, steps: int, machine: str, link: str) -> None:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    def seconds(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"

    def megabytes(value: int | None) -> str:
        return "–" if value is None else f"{value / 1e6:.1f}"

    heads = ("devices", "picture", "faster", "exact", "later", "MB", "MB later", "hidden", "VAE")
    table = Table(*(Column(head, no_wrap=True) for head in heads), box=SIMPLE, padding=(0, 1, 0, 0))
    for one in found:
        row = _row(one, found[0])
        times = [seconds(row[name]) for name in ("exact_step_s", "stale_step_s")]
        sent = [megabytes(row[name]) for name in ("exact_step_bytes", "stale_step_bytes")]
        hidden = "–" if row["hidden"] is None else f"{row['hidden']:.0%}"
        image = seconds(row["picture_s"]), f"{row['speedup']:.2f}"
        table.add_row(str(one.devices), *image, *times, *sent, hidden, seconds(row["decoding_s"]))
    exact = min(steps, feature.warmup) if any(one.stale for one in found) else steps
    console().print(table)
    say(
        f"{machine}, {link}; mode {feature.mode}; an image: {exact} exact steps, {steps - exact} later ones, the VAE; "
        "faster: than the first row; MB: what the busiest device sends in an exact and in a later step; hidden: share "
        "of the messages' time behind computation"
    )
