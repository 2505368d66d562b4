"""What the training programs make of their options; imports torch, unlike `training_options`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from training_options import exit_if_stopped, report, settings_from

from diffusion_accel.training import clusters
from diffusion_accel.training.affinity import read_affinity
from diffusion_accel.training.denoising import Process
from diffusion_accel.training.diffusion_task import Objective
from diffusion_accel.training.files import UsageError
from diffusion_accel.training.loop import Task, train
from diffusion_accel.training.noise import NoiseChoice


def objective_from(options: argparse.Namespace, process: Process, scalable: bool = False, **fixed: Any) -> Objective:
    """The objective that the switches ask for; `scalable`: what the model draws is divided by a factor that is saved.

    Raises:
        UsageError: they do not go together.
    """
    intervals: tuple[clusters.Interval, ...] = ()
    if options.task_clusters is not None:
        if options.clustering == "timestep":
            distance = clusters.timestep_distance()
        elif options.clustering == "snr":
            distance = clusters.snr_distance(process)
        else:
            if options.affinity is None:
                raise UsageError("--clustering gradient needs --affinity FILE, which --measure-affinity writes")
            distance = clusters.gradient_distance(read_affinity(options.affinity))
        intervals = tuple(clusters.cluster(distance, options.task_clusters))
    elif options.task_loss != "none":
        raise UsageError(f"--task-loss {options.task_loss} needs --task-clusters")
    noise = NoiseChoice.parse(options.immiscible)
    if noise.scale != 1 and not scalable:
        raise UsageError(
            f"--immiscible {options.immiscible}: image scaling is for latents, whose scale the saved VAE knows; use "
            "scripts/train_diffusion.py with --vae, or leave scale out"
        )
    switches = {"intervals": intervals, "task_loss": options.task_loss, "min_snr": options.min_snr}
    return Objective(process=process, noise=noise, **switches, **fixed)


def make_accelerator(options: argparse.Namespace) -> Accelerator:
    """The processes of this run, in the precision that was asked for; warns if the launcher started one only."""
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    if accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        text = "warning: the launcher asked for several processes but started one; use torchrun on a CPU"
        print(text, file=sys.stderr)
    return accelerator


def train_stage(
    stage: str,
    folder: Path,
    task: Callable[[argparse.Namespace], Task],
    tuned: dict[str, Any],
    options: argparse.Namespace,
    accelerator: Accelerator,
) -> None:
    """Train one stage of a recipe in its folder, report where it stopped, and end the program if a signal asked to."""
    settings = settings_from(tuned, options, getattr(options, f"{stage}_steps"))
    if options.overwrite and not options.resume and accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    outcome = train(task(options), folder, settings, accelerator, resume=options.resume)
    if accelerator.is_main_process:
        processes = accelerator.num_processes
        report(stage, step=outcome.step, steps=settings.steps, finished=outcome.finished, processes=processes)
    exit_if_stopped(outcome, accelerator)
