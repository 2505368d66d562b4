"""A pipeline as a command's settings ask for it; what this machine and the pipeline cannot do is refused."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
import typer
from rich.table import Table

from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.generation.drawing import Drawn, check_drawable, check_requests, prepare, takes_neither
from diffusion_accel.generation.loading import best_device, model_hash, open_pipeline
from diffusion_accel.generation.outputs import OutputPlan
from diffusion_accel.generation.records import Origin, how_quantized, record
from diffusion_accel.model_files.names import ModelSource, pipeline_name
from diffusion_accel.pipelines.loading import load_pipeline

from .settings import Settings
from .terminal import console, note, say

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

    from diffusion_accel.feature import Feature


def check_machine(settings: Settings) -> str:
    """Refuse what this machine cannot do; returns the device to use. No model is loaded yet."""
    name = settings.device or best_device()
    try:
        kind = torch.device(name).type
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"--device {name} is not usable here; this machine's best is {best_device()}"
        ) from error
    if kind == "meta":
        raise ConfigurationError("--device meta computes nothing; use cpu, cuda or mps")
    if settings.dtype == "float16" and kind == "cpu":
        raise ConfigurationError("--dtype float16 is not usable on a CPU; use float32 or bfloat16")
    if settings.offload != "none" and kind == "cpu":
        raise ConfigurationError(
            f"--offload {settings.offload} needs an accelerator to move models to; this runs on cpu"
        )
    if settings.attention == "xformers" and kind != "cuda":
        raise ConfigurationError(f"--attention xformers runs on CUDA only, not on {kind}; use sdpa")
    return name


def check_takes(source: ModelSource, classes: list[str]) -> None:
    """Refuse a pipeline that is called with neither a prompt nor a class, and classes for one that takes prompts; as
    far as a local folder tells before it is loaded."""
    cls = getattr(diffusers, pipeline_name(source) or "", None)
    if cls is None:
        return
    parameters = inspect.signature(cls.__call__).parameters
    if "prompt" not in parameters and "class_labels" not in parameters:
        raise ModelLoadError(takes_neither(cls))
    if classes and "class_labels" not in parameters:
        raise ConfigurationError(f"--class is for models of classes; {cls.__name__} takes a prompt")


def open_for(
    settings: Settings, source: ModelSource, device: str, *, quiet: bool = True, promptless: bool = False
) -> DiffusionPipeline:
    """The pipeline that the settings ask for, with its features.

    Args:
        settings, source: of the command.
        device: from `check_machine`.
        quiet: show no progress of sampling, and no notes.
        promptless: a pipeline that is called with neither a prompt nor a class will do.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    compiling = logging.getLogger("diffusion_accel.compiled")  # which takes a while, so it is said
    compiling.setLevel(logging.NOTSET if quiet else logging.INFO)
    pipe: Any = _open(settings, source, device, list(settings.features.values()))
    if not promptless:
        check_drawable(pipe)
    pipe.set_progress_bar_config(disable=quiet or not sys.stderr.isatty(), leave=False)
    for name in pipe.acceleration.features:
        if name not in settings.features and not quiet:
            note(f"{name.replace('_', ' ')} is on: the model was trained with it")
    return pipe


def open_plain(settings: Settings, source: ModelSource, device: str) -> DiffusionPipeline | None:
    """What a quantized model is compared with: the same before it was; None where nothing of the kind is asked for."""
    if not settings.compare or settings.quantize is None:
        return None
    whole = dataclasses.replace(settings, quantize=None, runtime=None, low_memory=False)
    plain: Any = _open(whole, source, device, [f for f in settings.features.values() if f.changes_output])
    plain.set_progress_bar_config(disable=True)
    return plain


def load_plain(source: ModelSource) -> DiffusionPipeline:
    """The pipeline of a model as it is, without features."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    return load_pipeline(source)


def _open(settings: Settings, source: ModelSource, device: str, features: list[Feature]) -> DiffusionPipeline:
    return open_pipeline(
        source,
        features=features,
        scheduler=settings.scheduler,
        loras=settings.loras,
        device=device,
        offload=settings.offload,
        attention=settings.attention,
        task=settings.task,
        controlnet=settings.controlnet,
        dtype=getattr(torch, settings.dtype),
        allow_pickle=settings.allow_pickle,
        quantize=settings.quantize,
        runtime=settings.runtime,
        low_memory=settings.low_memory,
    )


def draw_all(
    settings: Settings,
    source: ModelSource,
    device: str,
    plans: list[OutputPlan],
    *,
    writes: bool = True,
    quiet: bool = False,
    json_lines: bool = False,
) -> None:
    """Draw and write every request, and say so.

    Args:
        settings, source: of the command.
        device: from `check_machine`.
        plans: the requests with their files.
        writes: whether this process writes files; others of its job only compute.
        quiet: print nothing but JSON lines.
        json_lines: print a JSON line for each image.
    """
    pipe: Any = open_for(settings, source, device, quiet=quiet)
    plain = open_plain(settings, source, device)
    check_requests(pipe, [plan.request for plan in plans])
    keys = ("dtype", "lora", "quantize", "runtime", "controlnet")
    origin = Origin(
        pipe=pipe,
        model=source.name,
        model_hash=model_hash(source),
        features=settings.features,
        settings={key: getattr(settings, key) for key in keys},
        whole_paths=settings.paths,
    )
    noted: set[str] = set()
    for plan in plans:
        request = plan.request
        call = prepare(pipe, request)
        for text in call.notes():
            if text not in noted or text.startswith("the prompt"):
                note(text)
            noted.add(text)
        drawn = call.draw(comparing=settings.compare, plain=plain)
        if not writes:
            continue

        def describe(image: Image.Image, seed: int, plan: OutputPlan = plan, drawn: Drawn = drawn) -> tuple[str, Any]:
            return origin.text(plan.request, seed, drawn, image.size), origin.data(plan.request, seed, drawn)

        for file in plan.write(drawn, describe if settings.metadata else None):
            if json_lines and file.seed is not None:
                typer.echo(json.dumps(record(file.path, request, file.seed, drawn)))
            elif not json_lines and not quiet:
                say(f"{file.path}  {file.words or f'(seed {file.seed})'}")
        if not json_lines and not quiet:
            print_summary(pipe, drawn, plan.compared)


def print_summary(pipe: DiffusionPipeline, drawn: Drawn, compared: Path | None) -> None:
    """The report, and with a comparison the table of what was gained and lost."""
    say(drawn.report, lines=True)
    quantized = how_quantized(pipe)
    if quantized:
        say(f"  {quantized}")
    c = drawn.comparison
    if c is None:
        return
    table = Table("time ratio", "FLOP ratio", "PSNR dB", "SSIM", title="against plain diffusers (1.00 = equal)")
    psnr, ssim = sorted(c.psnr)[len(c.psnr) // 2], sorted(c.ssim)[len(c.ssim) // 2]
    table.add_row(f"{c.time_ratio:.2f}", f"{c.flop_ratio:.2f}", f"{psnr:.1f}", f"{ssim:.3f}")
    console().print(table)
    say(f"side by side: {compared}")
