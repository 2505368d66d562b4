"""`generate`: images from prompts."""

from __future__ import annotations

import dataclasses
import json
import secrets
from typing import Annotated

import typer

from diffusion_accel import interrupts
from diffusion_accel.errors import ConfigurationError

from . import processes
from .common_options import Debug, GuidanceScale, Model, Pixels, Scheduler, Steps, number
from .feature_flags import with_feature_flags
from .settings import (
    ATTENTION,
    DTYPES,
    LIMITS,
    MAX_IMAGES,
    OFFLOAD,
    RUNTIMES,
    Job,
    Settings,
    check_features,
    check_images,
    check_strength,
    merge,
    read_config,
    read_jobs,
    refuse_jpeg,
)
from .terminal import say
from .transparency import by_image, drawn_layers, extra_paths, layer_path, save_previews

_IMAGES = {"rich_help_panel": "Image and control inputs"}
_MACHINE = {"rich_help_panel": "Machine"}
_TRANSPARENT = {"rich_help_panel": "Transparency (with --transparent)"}
_OUTPUT = {"rich_help_panel": "Output"}


@with_feature_flags
def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="One or more prompts.", show_default=False)] = None,
    prompts_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="A prompt a line, or .jsonl with overrides for each line.")
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME|NUMBER", help="Instead of a prompt, for models of classes (DiT)."),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the image should not show.")] = None,
    model: Model = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    scheduler: Scheduler = None,
    width: Pixels = None,
    height: Pixels = None,
    seed: Annotated[
        int | None, typer.Option(help="Image k of a prompt uses seed + k. (0 to 2^63 - 1)", show_default="random")
    ] = None,
    num_images: Annotated[int | None, number("Images for each prompt.", LIMITS["num_images"], show_default="1")] = None,
    image: Annotated[str | None, typer.Option(metavar="FILE", help="Start from this image.", **_IMAGES)] = None,
    mask_image: Annotated[
        str | None, typer.Option(metavar="FILE", help="Inpaint where it is white.", **_IMAGES)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of --image is replaced: above 0, 1 at most, and at least one step.",
            show_default="the pipeline's, mostly 0.8",
            **_IMAGES,
        ),
    ] = None,
    controlnet: Annotated[str | None, typer.Option(help="Folder or hub id of a ControlNet.", **_IMAGES)] = None,
    control_image: Annotated[
        str | None, typer.Option(metavar="FILE", help="Input of the ControlNet.", **_IMAGES)
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="PATH[:SCALE]", help="LoRA weights; may be repeated.", **_IMAGES)
    ] = None,
    allow_pickle: Annotated[
        bool | None, typer.Option("--allow-pickle", help="Also load pickled weights, which can run code.", **_MACHINE)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps, …", show_default="the best one here", **_MACHINE)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=", ".join(DTYPES) + ".", show_default=Settings.dtype, **_MACHINE)
    ] = None,
    offload: Annotated[
        str | None, typer.Option(help=", ".join(OFFLOAD) + ".", show_default=Settings.offload, **_MACHINE)
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help=", ".join(ATTENTION) + ".", show_default=Settings.attention, **_MACHINE)
    ] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile", help="torch.compile the repeated blocks.", **_MACHINE)
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="DIR|PACKAGE:KIND", help="A quantized checkpoint, or torchao:int8wo, …", **_MACHINE),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="How a quantized model computes: " + ", ".join(RUNTIMES) + ".", show_default="auto", **_MACHINE
        ),
    ] = None,
    low_memory: Annotated[
        bool | None, typer.Option("--low-memory", help="Keep quantized weights packed in memory.", **_MACHINE)
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="A .png, .webp or .jpg file, or a folder.",
            show_default=f"the folder {Settings.output}",
            **_OUTPUT,
        ),
    ] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace existing files.", **_OUTPUT)] = None,
    metadata: Annotated[
        bool | None,
        typer.Option(
            "--metadata/--no-metadata", help="Write settings into the image.", show_default="metadata", **_OUTPUT
        ),
    ] = None,
    paths_: Annotated[
        bool | None, typer.Option("--paths", help="In them, whole paths of local files, not only names.", **_OUTPUT)
    ] = None,
    compare: Annotated[
        bool | None, typer.Option("--compare", help="Run plain diffusers too; image and table.", **_OUTPUT)
    ] = None,
    premultiplied: Annotated[
        bool | None, typer.Option("--premultiplied", help="Write colours multiplied by alpha.", **_TRANSPARENT)
    ] = None,
    preview: Annotated[
        str | None,
        typer.Option(metavar="checkerboard|COLOUR|FILE", help="Also write each image over this.", **_TRANSPARENT),
    ] = None,
    layers_: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="fg,bg,blend",
            help="Which drawn layers to write.",
            show_default="all of them",
            **_TRANSPARENT,
        ),
    ] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON line an image on stdout.", **_OUTPUT)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.", **_OUTPUT)] = False,
    config: Annotated[str | None, typer.Option(metavar="FILE", help="TOML or JSON with flag names as keys.")] = None,
    debug: Debug = False,
    **features: str | None,
) -> None:
    """Generate images, plain or accelerated."""
    flags = {**locals(), **features}
    own = ("features", "prompt", "classes", "prompts_file", "json_lines", "quiet", "config", "debug")
    for key in own:
        flags.pop(key)
    flags["layers"], flags["paths"] = flags.pop("layers_"), flags.pop("paths_")
    if lora is not None:
        flags["lora"] = tuple(lora)
    values = {} if config is None else read_config(config)
    more = values.pop("prompt", [])
    from_config = values.pop("prompts_file", None)
    file = from_config if prompts_file is None else prompts_file
    given = [*(prompt or []), *(classes or [])]
    jobs = read_jobs(given or ([more] if isinstance(more, str) else list(more)), file)
    settings, source = merge(flags, values)
    starts = processes.must_start(settings)
    settings = processes.join(settings)
    plans = processes.same_seeds(settings, [_resolve(settings, job) for job in jobs])

    from .output import check_distinct, check_fits, check_free, plan_outputs

    for plan in plans:
        check_strength(plan)
        check_features(plan)
    if (total := sum(plan.num_images for plan in plans)) > MAX_IMAGES:
        raise ConfigurationError(f"{total} images are asked for; one command draws at most {MAX_IMAGES}")
    seeds = [_seeds(plan) for plan in plans]
    paths = plan_outputs(settings.output, seeds, [j.output for j in jobs], settings.overwrite)
    layers = drawn_layers(settings)
    beside = [file for group in paths for path in group for file in extra_paths(path, settings)]
    check_free(beside, settings.overwrite)
    for path in [path for group in paths for path in group] if layers != ("",) else ():
        refuse_jpeg(path)
    compared = [p[0].with_name(f"{p[0].stem}-compare.png") for p in paths] if settings.compare else []
    check_free(compared, settings.overwrite)
    check_distinct([path for group in paths for path in group if len(layers) == 1] + beside + compared)
    for group, plan in zip(paths, plans, strict=True):
        check_fits(group, plan.width, plan.height)

    check_images(settings)

    if starts:  # they check the rest: this one need not import torch
        return processes.start(settings)
    from .session import Session, check_machine, check_takes

    check_takes(source, classes or [])
    device_name = check_machine(settings)
    writes = processes.writes(settings)
    quiet, json_lines = quiet or not writes, json_lines and writes
    images = [{f for layer in layers if (f := layer_path(p, layer, settings))} for group in paths for p in group]

    def state() -> str:
        written = sum(files <= interrupts.finished() for files in images)
        return f"{written} of {len(images)} images were written" if written else interrupts.names()

    interrupts.explain(state)
    session = Session(settings, source, device_name, quiet=quiet)
    session.check([job.prompt for job in jobs], plans)
    for k, (job, plan) in enumerate(zip(jobs, plans, strict=True)):
        result = session.generate(job.prompt, plan, seeds[k])
        if not writes:
            continue
        if settings.compare:
            session.save_comparison(result, job.prompt, compared[k])
        for drawn, seed_, path in zip(by_image(result.images, layers), seeds[k], paths[k], strict=True):
            for layer, image_ in zip(layers, drawn, strict=True):
                file_ = layer_path(path, layer, settings)
                if file_ is None:
                    continue
                session.save(image_, file_, job.prompt, plan, seed_, result)
                if json_lines:
                    typer.echo(json.dumps(session.record(file_, job.prompt, seed_, result)))
                elif not quiet:
                    say(f"{file_}  (seed {seed_})")
            for file_, words in save_previews(path, dict(zip(layers, drawn, strict=True)), settings):
                if not quiet and not json_lines:
                    say(f"{file_}  {words}")
        if not json_lines and not quiet:
            session.print_summary(result, compared[k] if compared else None)


def _resolve(settings: Settings, job: Job) -> Settings:
    """The settings of one prompt; without a seed anywhere, a random one is drawn (and printed and stored)."""
    changes = {f.name: v for f in dataclasses.fields(Job) if (v := getattr(job, f.name)) is not None}
    for key in ("prompt", "output"):
        changes.pop(key, None)
    plan = dataclasses.replace(settings, **changes)
    return plan if plan.seed is not None else dataclasses.replace(plan, seed=secrets.randbelow(2**32))


def _seeds(plan: Settings) -> list[int]:
    assert plan.seed is not None
    return [plan.seed + k for k in range(plan.num_images)]
