"""Quantize a loaded pipeline, write it as a folder, load that again and measure it: what `diffusion_accel.quantize`
does."""

from __future__ import annotations

import inspect
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers

from diffusion_accel import interrupts
from diffusion_accel.arguments import public, refuse_unknown
from diffusion_accel.denoisers import denoiser_name, find_denoiser
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.io import shown as in_a_line
from diffusion_accel.io import writing
from diffusion_accel.measure.memory import process_peak
from diffusion_accel.measure.request import options_of, texts_of, usual_steps, whole
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.model_files.names import PICKLE_SUFFIXES, TRANSPARENCY, ModelSource
from diffusion_accel.outputs import check_free_folder, remove_folder, work_folder
from diffusion_accel.progress import Progress, silent
from diffusion_accel.quant.model import set_runtime
from diffusion_accel.recipes.saving import copy_beside

from .budget import plan_report
from .folder import clear, held
from .report import QuantizationReport, measure, write
from .run import QuantizationRun, quantize_denoiser
from .settings import QuantizeSettings, settings_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Load = Callable[[ModelSource], Any]
_FIELDS = {f.name for f in fields(QuantizeSettings)} - {"weight_bits", "activation_bits", "seed"}


@public
def quantize(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    *,
    bits: str | None = None,
    output: str | Path | None = None,
    settings: QuantizeSettings | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch: int = 8,
    images: int = 16,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress = silent,
    source: ModelSource | None = None,
    load: Load | None = None,
    **changes: Any,
) -> QuantizationReport:
    """Quantize a pipeline's U-Net or transformer: fewer bits, calibrated and finetuned.

        report = quantize(pipe, prompts, bits="w4a8", output="sticker-w4a8", minutes=30)
        print(report.text())

    With `output` a pipeline folder is written, with report.html in it, that diffusers' `from_pretrained` loads once
    `diffusion_accel` was imported; `pipe` is as before. An interrupted run goes on when it is called again with the
    same arguments, and ends in the same bytes; what lies between is kept in `<output>.work`. Without `output` the
    pipeline itself has the quantized model afterwards.

    Source: Wang et al., "QuEST: Low-bit Diffusion Model Quantization via Efficient Selective Finetuning", on the ground
    of Q-Diffusion and AdaRound; see docs/quantization.md.

    Args:
        pipe: a loaded pipeline with one denoiser in full precision, and the scheduler that will be used.
        prompts: what the model is usually asked for, 2 or more, 64 recommended: grids are fitted to them, an eighth is
            kept to judge by. Names or numbers of classes for a pipeline of classes; what they say does not matter to an
            unconditional one.
        bits: of weights and inputs, such as "w8a8" (the default), "w4a8", "w4a4", or "w8", "w4" for weights only.
        output: the folder to write.
        settings: everything that can be chosen, in place of the recommended settings; `bits`, `seed` and `changes` are
            applied to them.
        minutes: about how long it may take; None: the published numbers of steps, hours on a GPU.
        steps: denoising steps of the trajectories; None: the pipeline's own default, as for the next three.
        seed: of everything random; image k starts from the noise of seed + k. None: that of the settings, 0.
        guidance_scale: 0 to 1000; 1 switches classifier-free guidance off.
        height, width: pixels.
        batch: images in a call.
        images: how many the report compares with full precision; 0: none, and no times. Only with `output`.
        overwrite: replace an existing pipeline folder.
        restart: forget what an interrupted run left.
        progress: told what is being done.
        source: what the pipeline was loaded from, if nothing of it has changed since: its other parts are then copied
            as they are instead of being saved.
        load: loads the written folder for the report; None: diffusers' `DiffusionPipeline.from_pretrained`.
        changes: single fields of `QuantizeSettings`: bits_budget, rounding, finetune, layers, softmax_bits, …

    Returns:
        What was measured: errors, fidelity, sizes, times.

    Raises:
        ConfigurationError: an argument is not allowed, unknown, or not what the interrupted run began with; the model
            has values that are no finite numbers; the budget of bits cannot be kept.
        UnsupportedPipelineError: there is no denoiser that can be quantized.
        OutputError: the folder exists, is in use by another run, or cannot be written.
    """
    refuse_unknown(changes, {*_FIELDS, *inspect.signature(quantize).parameters}, "quantize()")
    chosen = settings_of(bits, settings, seed, **changes)
    if minutes is not None and not (type(minutes) in (int, float) and 0 < minutes < math.inf):
        raise ConfigurationError(f"minutes must be a number above 0, got {in_a_line(minutes)}")
    texts = tuple(texts_of(pipe, prompts, 2))
    options = options_of(pipe, steps=steps, guidance_scale=guidance_scale, height=height, width=width)
    images = whole("images", images, 0)
    count = options.pop("num_inference_steps", None) or usual_steps(pipe) or 50
    sampler = Sampler(pipe, texts, count, chosen.seed, whole("batch", batch), options)
    if output is None:
        with interrupts.temporary_folder() as work:
            return _measured_in_place(quantize_denoiser(sampler, chosen, work, minutes, progress), minutes, len(texts))
    folder = Path(output)
    check_free_folder(folder, overwrite)
    work = work_folder(folder)
    with held(work), writing(folder):
        if restart:
            clear(work)
        order = _Order(sampler, chosen, folder, source, load or _load, overwrite, minutes, images)
        report = _export(order, work, progress)
        with interrupts.unfinished(work):  # not needed any more
            return report


@dataclass(frozen=True)
class _Order:
    """What is to be written, and how it is to be measured."""

    sampler: Sampler
    settings: QuantizeSettings
    folder: Path
    source: ModelSource | None
    load: Load
    overwrite: bool
    minutes: float | None
    images: int


def _export(order: _Order, work: Path, progress: Progress) -> QuantizationReport:
    """Quantize, write, load what was written, measure it, and give it its name."""
    began, pipe, folder = time.monotonic(), order.sampler.pipe, order.folder
    done = quantize_denoiser(order.sampler, order.settings, work, order.minutes, progress)
    made = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with interrupts.unfinished(made):
        progress("writing", 1.0, 0.0)
        save(pipe, order.source, made)
        parameters = _parameters(done)
        done.restore()
        twin = _twin(order, made)
        report = QuantizationReport(order.settings.name, str(folder), {})
        progress("measuring", 1.0, 0.0)
        measuring = time.monotonic()
        whole_budget = 60 * (order.minutes or 0.0)
        each = done.seconds["calibration"] / len(done.sampler.prompts)
        left = None if order.minutes is None else whole_budget - (time.monotonic() - began)
        images, rounds = plan_report(order.images, each, left, whole_budget)
        seen = shown(order.source, order.sampler.prompts, images, order.settings)
        full = replace(order.sampler, prompts=seen, seed=order.settings.seed + 100_000)
        measure(full, replace(full, pipe=twin), done.heldout, report, rounds)
        files = sorted((made / str(denoiser_name(pipe))).glob("*.safetensors"))
        report.bytes = {"checkpoint": sum(f.stat().st_size for f in files), "float32": 4 * parameters}
        _note_run(report, done, order.minutes)
        report.prompts = (len(done.sampler.prompts), len(order.sampler.prompts))
        report.seconds["report"] = round(time.monotonic() - measuring, 1)
        write(report, made)
        shutil.copy(work / "log.jsonl", made / "log.jsonl")
        with interrupts.undivided():
            put(made, folder, order.overwrite)
    return report


def _measured_in_place(done: QuantizationRun, minutes: float | None, asked: int) -> QuantizationReport:
    """The report of a pipeline that was quantized where it is: without images and times."""
    report = QuantizationReport(done.settings.name, "", {})
    nothing = replace(done.sampler, prompts=())
    measure(nothing, nothing, done.heldout, report)
    stored = sum(t.numel() * t.element_size() for t in done.model.state_dict().values())
    report.bytes = {"checkpoint": stored, "float32": 4 * _parameters(done)}
    _note_run(report, done, minutes)
    report.prompts = (len(done.sampler.prompts), asked)
    set_runtime(done.model)
    return report


def _note_run(report: QuantizationReport, done: QuantizationRun, minutes: float | None) -> None:
    """Note what a run has measured and taken."""
    report.validation, report.losses, report.seconds = done.validation, done.losses, done.seconds
    report.search = done.search
    report.peak, report.buckets = process_peak() or 0, len(done.spec.timesteps)
    report.budget = None if minutes is None else 60 * minutes


def _parameters(done: QuantizationRun) -> int:
    """How many numbers the model has in full precision."""
    packed = sum(layer.weight_shape.numel() for layer in done.layers().values())
    return sum(p.numel() for p in done.model.parameters()) + packed


def _twin(order: _Order, made: Path) -> DiffusionPipeline:
    """What was written, loaded again, beside the pipeline that it was made from."""
    pipe = order.sampler.pipe
    twin = order.load(ModelSource("folder", order.folder.name, str(made)))
    twin.set_progress_bar_config(disable=True)
    twin.scheduler = pipe.scheduler
    denoiser = find_denoiser(pipe)
    assert denoiser is not None
    twin.to(next(denoiser.parameters()).device)
    return twin


def _load(source: ModelSource) -> DiffusionPipeline:
    return diffusers.DiffusionPipeline.from_pretrained(source.location)


def shown(
    source: ModelSource | None, prompts: Sequence[str], count: int, settings: QuantizeSettings
) -> tuple[str, ...]:
    """Prompts for the images of the report: never those that were calibrated on."""
    if source is not None and source.kind == "embedded":
        return tuple(embedded_prompts(count, max(200, len(prompts))))
    kept = settings.validation or max(1, len(prompts) // 8)
    return tuple(prompts[-kept:])[:count]


def save(pipe: DiffusionPipeline, source: ModelSource | None, folder: Path) -> None:
    """Write a pipeline with a quantized denoiser; parts that did not change are copied as they are where that works."""
    part = str(denoiser_name(pipe))
    root = Path(source.location) if source is not None and source.kind in ("embedded", "folder") else None
    local = root is not None and (root / part).is_dir()
    if root is not None and local and not any(f.suffix in PICKLE_SUFFIXES for f in root.rglob("*")):
        parts = {name for name in (*pipe.components, TRANSPARENCY) if (root / name).is_dir()} - {part}
        folder.mkdir(parents=True)
        shutil.copy(root / "model_index.json", folder)
        for name in sorted(parts):
            shutil.copytree(root / name, folder / name)
        getattr(pipe, part).save_pretrained(folder / part)
    else:
        pipe.save_pretrained(folder)
        copy_beside(pipe, folder)


def put(made: Path, folder: Path, overwrite: bool) -> None:
    """Rename a finished folder to its name; an older one of that name goes only then."""
    if folder.is_dir():
        if overwrite:
            aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            folder.replace(aside)
            try:
                interrupts.finish(made, folder)
            except BaseException:
                aside.replace(folder)
                raise
            remove_folder(aside)
            return
        folder.rmdir()  # empty, or this fails
    interrupts.finish(made, folder)
