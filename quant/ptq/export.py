"""Quantize a loaded pipeline, write it as a folder, load that again and measure it: what the command and the script
do."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_accel import interrupts
from diffusion_accel.denoisers import denoiser_name, find_denoiser
from diffusion_accel.evaluation.quality import embedded_prompts
from diffusion_accel.io import writing
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.model_files.names import PICKLE_SUFFIXES, TRANSPARENCY, ModelSource
from diffusion_accel.progress import Progress

from .budget import plan_report
from .folder import clear, held
from .report import QuantizationReport, measure, peak_memory, write
from .run import quantize_denoiser
from .settings import QuantizeSettings


def run(
    pipe: Any,
    source: ModelSource,
    prompts: list[str],
    settings: QuantizeSettings,
    folder: Path,
    progress: Progress,
    *,
    load: Callable[[ModelSource], Any],
    overwrite: bool = False,
    restart: bool = False,
    minutes: float | None = None,
    images: int = 16,
    batch: int = 8,
    steps: int = 50,
    options: dict[str, Any] | None = None,
) -> QuantizationReport:
    """Quantize `pipe`, write the pipeline to `folder` with a report, and return the report. `pipe` is as before
    after it.

    What lies between is kept in `<folder>.work` until the folder is complete. See `process.quantize` for the rest.
    """
    work = folder.with_name(f"{folder.name}.work")
    with held(work), writing(folder):
        if restart:
            clear(work)
        sampler = Sampler(pipe, tuple(prompts), steps, settings.seed, batch, options or {})
        report = _run(sampler, source, settings, folder, work, progress, overwrite, minutes, images, load)
        with interrupts.unfinished(work):  # not needed any more
            return report


def _run(
    sampler: Sampler,
    source: ModelSource,
    settings: QuantizeSettings,
    folder: Path,
    work: Path,
    progress: Progress,
    overwrite: bool,
    minutes: float | None,
    images: int,
    load: Callable[[ModelSource], Any],
) -> QuantizationReport:
    began, pipe = time.monotonic(), sampler.pipe
    done = quantize_denoiser(sampler, settings, work, minutes, progress)
    made = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with interrupts.unfinished(made):
        progress("writing", 1.0, 0.0)
        save(pipe, source, made)
        parameters = sum(p.numel() for p in done.model.parameters()) + sum(
            layer.weight_shape.numel() for layer in done.layers().values()
        )
        done.restore()
        twin = load(ModelSource("folder", folder.name, str(made)))
        twin.set_progress_bar_config(disable=True)
        twin.scheduler = pipe.scheduler
        device = next(find_denoiser(pipe).parameters()).device  # type: ignore[union-attr]
        twin.to(device)
        report = QuantizationReport(settings.name, str(folder), {}, validation=done.validation, losses=done.losses)
        progress("measuring", 1.0, 0.0)
        measuring = time.monotonic()
        whole = 60 * (minutes or 0.0)
        each = done.seconds["calibration"] / len(done.sampler.prompts)
        left = None if minutes is None else whole - (time.monotonic() - began)
        images, rounds = plan_report(images, each, left, whole)
        seen = shown(source, sampler.prompts, images, settings)
        full = replace(sampler, prompts=seen, seed=settings.seed + 100_000)
        measure(full, replace(full, pipe=twin), done.heldout, report, rounds)
        files = sorted((made / str(denoiser_name(pipe))).glob("*.safetensors"))
        report.bytes = {"checkpoint": sum(f.stat().st_size for f in files), "float32": 4 * parameters}
        report.seconds, report.peak, report.buckets = done.seconds, peak_memory(), len(done.spec.timesteps)
        report.budget = None if minutes is None else whole
        report.prompts = (len(done.sampler.prompts), len(sampler.prompts))
        report.seconds["report"] = round(time.monotonic() - measuring, 1)
        write(report, made)
        shutil.copy(work / "log.jsonl", made / "log.jsonl")
        with interrupts.undivided():
            put(made, folder, overwrite)
    return report


def shown(source: ModelSource, prompts: Sequence[str], count: int, settings: QuantizeSettings) -> tuple[str, ...]:
    """Prompts for the images of the report: never those that were calibrated on."""
    if source.kind == "embedded":
        return tuple(embedded_prompts(count, max(200, len(prompts))))
    kept = settings.validation or max(1, len(prompts) // 8)
    return tuple(prompts[-kept:])[:count]


def save(pipe: Any, source: ModelSource, folder: Path) -> None:
    """Write a pipeline with a quantized denoiser; parts that did not change are copied as they are where that works."""
    part = str(denoiser_name(pipe))
    root = Path(source.location)
    local = source.kind in ("embedded", "folder") and (root / part).is_dir()
    if local and not any(f.suffix in PICKLE_SUFFIXES for f in root.rglob("*")):
        parts = {name for name in (*pipe.components, TRANSPARENCY) if (root / name).is_dir()} - {part}
        folder.mkdir(parents=True)
        shutil.copy(root / "model_index.json", folder)
        for name in sorted(parts):
            shutil.copytree(root / name, folder / name)
        getattr(pipe, part).save_pretrained(folder / part)
    else:
        pipe.save_pretrained(folder)


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
            shutil.rmtree(aside)
            return
        folder.rmdir()  # empty, or this fails
    interrupts.finish(made, folder)
