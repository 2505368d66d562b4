"""`generate`: images from prompts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from diffusion_accel import interrupts
from diffusion_accel.generation.request import IP_ADAPTER_SCALE, LIMITS

from . import bulk, processes
from .common_options import (
    AllowPickle,
    Device,
    Dtype,
    GuidanceScale,
    Model,
    Pixels,
    RecipeOption,
    Scheduler,
    Steps,
    in_panels,
    number,
)
from .feature_flags import with_feature_flags
from .from_image import read_again
from .heavy import large_imports
from .prompts import Job, plan_jobs, read_jobs, request_of
from .settings import ATTENTION, LISTS, OFFLOAD, PREVIEW_STEPS, RUNTIMES, Settings, merge, read_config
from .terminal import note

_OWN = ("features", "prompt", "classes", "prompts_file", "json_lines", "quiet", "config", "from_")  # not settings
_PANELS = {
    "What is drawn": "prompts_file classes negative_prompt prompt_weights from_ config",
    "How it is drawn": "model steps guidance_scale scheduler width height seed count frames fps",
    "Image and control inputs": "image mask_image strength controlnet control_image controlnet_conditioning_scale "
    "control_guidance_start control_guidance_end ip_adapter ip_adapter_image ip_adapter_scale lora",
    "Machine": "allow_pickle device dtype offload attention quantize runtime low_memory recipe",
    "Output": "output overwrite distribute preview_steps metadata paths_ compare json_lines quiet",
    "Transparency (with --transparent)": "premultiplied preview layers_",
}


@with_feature_flags
@in_panels(_PANELS)
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
    prompt_weights: Annotated[
        bool | None,
        typer.Option("--prompt-weights", help="Prompts of any length, with weights: a (red)1.4 apple, leaf++, sky--."),
    ] = None,
    model: Model = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    scheduler: Scheduler = None,
    width: Pixels = None,
    height: Pixels = None,
    seed: Annotated[
        int | None, typer.Option(help="Image k of a prompt uses seed + k. (0 to 2^63 - 1)", show_default="random")
    ] = None,
    count: Annotated[
        int | None, number("Images for each prompt.", LIMITS["count"], "--count", show_default="1")
    ] = None,
    frames: Annotated[int | None, number("Frames of a video.", LIMITS["frames"], show_default="the pipeline's")] = None,
    fps: Annotated[float | None, number("Frames a second of its file.", LIMITS["fps"], show_default="8")] = None,
    image: Annotated[str | None, typer.Option(metavar="FILE", help="Start from this image.")] = None,
    mask_image: Annotated[str | None, typer.Option(metavar="FILE", help="Inpaint where it is white.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of --image is replaced: above 0, 1 at most, and at least one step.",
            show_default="the pipeline's, mostly 0.8",
        ),
    ] = None,
    controlnet: Annotated[
        list[str] | None, typer.Option(help="Folder or hub id of a ControlNet; may be repeated.")
    ] = None,
    control_image: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Input of the ControlNet; one for each, in their order.")
    ] = None,
    controlnet_conditioning_scale: Annotated[
        list[float] | None,
        number(
            "How much the ControlNet counts; of several one for all, or one for each. The next two likewise.",
            LIMITS["controlnet_conditioning_scale"],
            show_default="1",
        ),
    ] = None,
    control_guidance_start: Annotated[
        list[float] | None,
        number("The share of the steps before it counts.", LIMITS["control_guidance_start"], show_default="0"),
    ] = None,
    control_guidance_end: Annotated[
        list[float] | None,
        number("The share of the steps after which it ends.", LIMITS["control_guidance_end"], show_default="1"),
    ] = None,
    ip_adapter: Annotated[
        str | None, typer.Option(metavar="FILE", help="Weights of an IP-Adapter, as .safetensors.")
    ] = None,
    ip_adapter_image: Annotated[
        str | None, typer.Option(metavar="FILE", help="What the IP-Adapter is shown beside the prompt.")
    ] = None,
    ip_adapter_scale: Annotated[
        float | None, number("How much that image counts.", IP_ADAPTER_SCALE, show_default="1")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH[:SCALE]", help="LoRA: a .safetensors file, or a folder with one; may be repeated."),
    ] = None,
    allow_pickle: AllowPickle = None,
    device: Device = None,
    dtype: Dtype = None,
    offload: Annotated[str | None, typer.Option(help=", ".join(OFFLOAD) + ".", show_default=Settings.offload)] = None,
    attention: Annotated[
        str | None, typer.Option(help=", ".join(ATTENTION) + ".", show_default=Settings.attention)
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="DIR|PACKAGE:KIND", help="A quantized checkpoint, or torchao:int8wo, …"),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(help="How a quantized model computes: " + ", ".join(RUNTIMES) + ".", show_default="auto"),
    ] = None,
    low_memory: Annotated[
        bool | None, typer.Option("--low-memory", help="Keep quantized weights packed in memory.")
    ] = None,
    recipe: RecipeOption = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="A .png, .webp or .jpg file, or a folder; of a video a .gif, .webp or .mp4 file.",
            show_default=f"the folder {Settings.output}",
        ),
    ] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace existing files.")] = None,
    distribute: Annotated[
        str | None,
        typer.Option(
            metavar="prompts",
            help="Go on where the same command ended, and share the prompts with all that run it.",
        ),
    ] = None,
    preview_steps: Annotated[
        int | None,
        number("Show each image after every so many steps, as NAME.preview.png until it is there.", PREVIEW_STEPS),
    ] = None,
    metadata: Annotated[
        bool | None,
        typer.Option("--metadata/--no-metadata", help="Write settings into the image.", show_default="metadata"),
    ] = None,
    paths_: Annotated[
        bool | None,
        typer.Option("--paths", help="In them, whole paths of local files, not only names; --from follows such paths."),
    ] = None,
    compare: Annotated[bool | None, typer.Option("--compare", help="Run plain diffusers too; image and table.")] = None,
    premultiplied: Annotated[
        bool | None, typer.Option("--premultiplied", help="Write colours multiplied by alpha.")
    ] = None,
    preview: Annotated[
        str | None,
        typer.Option(metavar="checkerboard|COLOUR|FILE", help="Also write each image over this."),
    ] = None,
    layers_: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="fg,bg,blend",
            help="Which drawn layers to write.",
            show_default="all of them",
        ),
    ] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON line an image on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")] = False,
    config: Annotated[str | None, typer.Option(metavar="FILE", help="TOML or JSON with flag names as keys.")] = None,
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="IMAGE", help="Draw again what this image was drawn with; flags win."),
    ] = None,
    **features: str | None,
) -> None:
    """Generate images, plain or accelerated."""
    flags = {**locals(), **features}
    for key in _OWN:
        flags.pop(key)
    flags["layers"], flags["paths"] = flags.pop("layers_"), flags.pop("paths_")
    flags |= {key: tuple(flags[key]) for key in LISTS if flags[key] is not None}
    values = {} if config is None else read_config(config)
    again = None
    if from_ is not None:
        chosen = {**values, **{key: value for key, value in flags.items() if value is not None}}
        named = {*chosen} | ({"prompt"} if prompt or classes or prompts_file or "prompts_file" in values else set())
        off = [key for key, value in chosen.items() if value is False or value == "off"]
        again = read_again(from_, named, bool(paths_ or values.get("paths")), off)
        values = {**again.values, **values}
    jobs = _jobs(prompt or [], classes or [], prompts_file, values, bool(image or values.get("image")))
    settings, source = merge(flags, values, restoring=True)
    if settings.distribute is not None:
        return bulk.draw(settings, source, jobs, classes or [], quiet=quiet, json_lines=json_lines)
    starts = processes.must_start(settings)
    settings = processes.join(settings)
    requests = processes.same_seeds(settings, [request_of(settings, job) for job in jobs])
    plans = plan_jobs(settings, source, requests, jobs)
    if starts:  # they check the rest: this one need not import torch
        return processes.start(settings)

    with large_imports():
        from . import session  # heavy: torch, diffusers

    session.check_takes(source, classes or [], [path for plan in plans for path in plan.paths])
    device_name = session.check_machine(settings)
    writes = processes.writes(settings)
    quiet, json_lines = quiet or not writes, json_lines and writes
    images = [plan.image_files(path) for plan in plans for path in plan.paths]

    def state() -> str:
        written = sum(files <= interrupts.finished() for files in images)
        return f"{written} of {len(images)} images were written" if written else interrupts.names()

    interrupts.explain(state)
    for text in () if again is None or quiet else again.notes(*session.drawn_by(source)):
        note(text)
    session.draw_all(settings, source, device_name, plans, writes=writes, quiet=quiet, json_lines=json_lines)


def _jobs(prompts: list[str], classes: list[str], file: str | None, config: dict[str, Any], image: bool) -> list[Job]:
    """The prompts of the command line and its file, or else those of the configuration file, whose keys are taken; none
    but an `image` will do for some pipelines."""
    more = config.pop("prompt", None) or []
    from_config = config.pop("prompts_file", None)
    given = [*prompts, *classes]
    if image and not (given or more or file or from_config):
        return [Job("")]
    return read_jobs(given or ([more] if isinstance(more, str) else list(more)), from_config if file is None else file)
