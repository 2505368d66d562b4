"""A pipeline as a command's settings ask for it; what this machine and the pipeline cannot do is refused."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
import typer
from rich.table import Table

from diffusion_accel.conditioning import PROMPT, check_prompts_do, condition_of, takes_prompt
from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.generation.clips import asks_for_frames, check_images, check_suffix, draws_clips
from diffusion_accel.generation.drawing import Drawn, check_drawable, check_requests, prepare, takes_neither
from diffusion_accel.generation.loading import best_device, model_hash, open_pipeline
from diffusion_accel.generation.outputs import OutputPlan
from diffusion_accel.generation.partial import impossible
from diffusion_accel.generation.records import Origin, how_quantized, record, versions
from diffusion_accel.image_metadata import whole_path
from diffusion_accel.measure.fidelity import decibels
from diffusion_accel.model_files.names import ModelSource
from diffusion_accel.pipelines.loading import class_of, load_pipeline
from diffusion_accel.pipelines.recipes import quantize_of

from .prompts import prompts_needed
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


def check_takes(source: ModelSource, classes: list[str], files: Iterable[Path] = ()) -> None:
    """Refuse a pipeline that is called with neither a prompt nor a class, and classes for one that takes prompts,
    and files that cannot hold what is drawn; as far as a local folder tells before it is loaded."""
    cls = class_of(source)
    if cls is None:
        return
    parameters = inspect.signature(cls.__call__).parameters
    if not {"prompt", "class_labels"} & parameters.keys() and not {"image", "num_frames"} <= parameters.keys():
        raise ModelLoadError(takes_neither(cls))
    if classes and "class_labels" not in parameters:
        raise ConfigurationError(f"--class is for models of classes; {cls.__name__} takes a prompt")
    for file in files:
        check_suffix(file, asks_for_frames(parameters))


def check_serves(source: ModelSource) -> None:
    """Refuse what a server cannot send, as far as a local folder tells before it is loaded."""
    check_takes(source, [])
    if (cls := class_of(source)) is not None:
        check_images(cls)


def check_texts(source: ModelSource, texts: Sequence[str] | None, why: str, least: int) -> None:
    """Refuse a model that is to draw prompts and has none, and one that needs more than prompts, before it is loaded
    (or, from the hub, downloaded); see `prompts_needed`."""
    cls = class_of(source, ask_hub=not texts)
    if cls is None:
        return
    check_prompts_do(cls, ("height", "width", "guidance_scale"))
    if not texts and takes_prompt(cls):
        raise prompts_needed(why, least)


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
    if not promptless:
        check_takes(source, [])
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
    return open_pipeline(**{**opening(settings, source), "device": device, "features": features})


def opening(settings: Settings, source: ModelSource) -> dict[str, Any]:
    """What `open_pipeline` is given for the settings, as values that another process can have."""
    keys = ("scheduler", "loras", "device", "offload", "attention", "task", "controlnet")
    more = ("ip_adapter", "ip_adapter_scale", "allow_pickle", "quantize", "runtime", "low_memory")
    return {
        "model": source,
        "features": list(settings.features.values()),
        "dtype": getattr(torch, settings.dtype),
        "recipe": settings.restored,
        **{key: getattr(settings, key) for key in keys + more},
    }


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A pipeline that draws requests, and what is said and kept of them.

    Attributes:
        pipe: with the features that the command asks for.
        plain: what it is compared with; None: itself without features.
        origin: for metadata.
        settings: of the command.
        noted: what was said once, a prompt's own notes with the prompt.
    """

    pipe: Any
    plain: DiffusionPipeline | None
    origin: Origin
    settings: Settings
    noted: set[tuple[str, str]] = dataclasses.field(default_factory=set)

    def parts(self, plan: OutputPlan) -> list[OutputPlan]:
        """What is drawn at a time, and then written: the images of a request together, each clip by itself."""
        return plan.each() if draws_clips(self.pipe) else [plan]

    def draw(self, plan: OutputPlan, *, writes: bool = True) -> Drawn:
        """Draw a request, and say first what is worth knowing of it; where it is asked for and this process `writes`,
        show it before it is finished."""
        call = prepare(self.pipe, plan.request)
        for text in call.notes():
            said = (text, plan.request.prompt if " tokens; " in text else "")
            if said not in self.noted:
                note(text)
            self.noted.add(said)
        every = self.settings.preview_steps if writes else None
        return call.draw(
            comparing=self.settings.compare, plain=self.plain, every=every, on_partial=lambda one: plan.show(one.images)
        )

    def write(self, plan: OutputPlan, drawn: Drawn, *, quiet: bool, json_lines: bool) -> None:
        """Write what was drawn, and say so: a line a file, or a JSON line an image."""

        def describe(image: Image.Image, seed: int) -> tuple[str, Any]:
            return self.origin.text(plan.request, seed, drawn, image.size), self.origin.data(plan.request, seed, drawn)

        for file in plan.write(drawn, describe if self.settings.metadata else None):
            if json_lines and file.seed is not None:
                typer.echo(json.dumps(record(file.path, plan.request, file.seed, drawn)))
            elif not json_lines and not quiet:
                say(f"{file.path}  {file.words or f'(seed {file.seed})'}")


def open_drawing(
    settings: Settings, source: ModelSource, device: str, plans: Sequence[OutputPlan], *, quiet: bool = False
) -> Drawing:
    """The pipeline that the settings ask for, to draw requests: none that it cannot draw, none into a file that cannot
    hold what it draws.

    Args:
        settings, source: of the command.
        device: from `check_machine`.
        plans: all that is to be drawn.
        quiet: show no progress of sampling, and no notes.
    """
    pipe = open_for(settings, source, device, quiet=quiet)
    plain = open_plain(settings, source, device)
    requests = [plan.request for plan in plans]
    check_requests(pipe, requests)
    for path in (path for plan in plans for path in plan.paths):
        check_suffix(path, draws_clips(pipe))
    if condition_of(pipe) == PROMPT and any(not request.prompt for request in requests):
        raise ConfigurationError("there is no prompt; give one, or --prompts-file")
    if draws_clips(pipe) and settings.compare:
        raise ConfigurationError(f"--compare compares images, and {type(pipe).__name__} draws videos")
    if settings.preview_steps is not None and (reason := impossible(getattr(pipe, "scheduler", None), pipe)):
        raise ConfigurationError(f"--preview-steps is not possible with {type(pipe).__name__}: {reason}")
    origin = Origin(
        pipe=pipe,
        model=whole_path(source.location) if settings.paths and source.kind != "embedded" else source.name,
        model_hash=model_hash(source),
        features=settings.features,
        settings=_kept(settings, source),
        whole_paths=settings.paths,
    )
    return Drawing(pipe, plain, origin, settings)


def drawn_by(source: ModelSource) -> tuple[dict[str, str], str | None]:
    """The versions of what draws here, and the hash of a model."""
    return versions(), model_hash(source)


def _kept(settings: Settings, source: ModelSource) -> dict[str, Any]:
    """The settings of a command that the metadata have beside those of each request; what a recipe brings is named as
    the recipe."""
    keys = ("scheduler", "lora", "device", "dtype", "attention", "quantize", "runtime", "low_memory", "controlnet")
    more = ("ip_adapter", "ip_adapter_scale", "premultiplied")
    kept: dict[str, Any] = {key: getattr(settings, key) for key in keys + more}
    recipe = settings.restored
    kept["recipe"] = settings.recipe if recipe is None else settings.recipe or "on"
    if recipe is not None:
        kept["of_recipe"] = [name for name, one in settings.features.items() if recipe.features.get(name) == one]
        if settings.quantize == quantize_of(recipe, source):
            kept["quantize"] = None
    return kept


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
    drawing = open_drawing(settings, source, device, plans, quiet=quiet)
    for plan in itertools.chain.from_iterable(map(drawing.parts, plans)):
        with plan.showing():
            drawn = drawing.draw(plan, writes=writes)
            if writes:
                drawing.write(plan, drawn, quiet=quiet, json_lines=json_lines)
        if writes and not json_lines and not quiet:
            print_summary(drawing.pipe, drawn, plan.compared)


def print_summary(pipe: DiffusionPipeline, drawn: Drawn, compared: Path | None) -> None:
    """The report, and with a comparison the table of what was gained and lost."""
    say(drawn.report, lines=True)
    quantized = how_quantized(pipe)
    if quantized:
        say(f"  {quantized}")
    c = drawn.comparison
    if c is None:
        return
    title = "against plain diffusers (2.00: twice as fast)"
    table = Table("time ratio", "FLOP ratio", "PSNR dB", "SSIM", title=title)
    psnr, ssim = sorted(c.psnr)[len(c.psnr) // 2], sorted(c.ssim)[len(c.ssim) // 2]
    table.add_row(f"{c.time_ratio:.2f}", f"{c.flop_ratio:.2f}", decibels(psnr, ""), f"{ssim:.3f}")
    console().print(table)
    say(f"side by side: {compared}")
