"""The stages of transparency: each reads what the ones before it left in the work folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from training_options import report
from training_setup import make_accelerator, train_stage

from diffusion_accel.training.denoising import Process
from diffusion_accel.training.diffusion_task import Objective
from diffusion_accel.training.files import replacing
from diffusion_accel.training.loop import Task
from diffusion_accel.training.noise import NoiseChoice

from . import denoiser
from .export import export_transparency
from .settings import ORDER, TUNED
from .tasks import DecoderTask, EncoderTask, JointTask, RefineTask


def load_base(options: argparse.Namespace) -> StableDiffusionPipeline:
    """The pipeline that becomes transparent."""
    return StableDiffusionPipeline.from_pretrained(options.model, use_safetensors=True)


def encoder_task(options: argparse.Namespace) -> Task:
    """Trains the encoder before the frozen VAE."""
    return EncoderTask(options.work, load_base(options).vae, options.start)


def decoder_task(options: argparse.Namespace) -> Task:
    """Trains the decoder behind it."""
    return DecoderTask(options.work, load_base(options).vae, options.start)


def joint_task(options: argparse.Namespace) -> Task:
    """Goes on with both together."""
    return JointTask(options.work, load_base(options).vae, options.start)


def unet_task(options: argparse.Namespace) -> Task:
    """Trains the low-rank update of the UNet."""
    objective = Objective(process=Process(), noise=NoiseChoice("knn", 4), uniform=0.4)
    return denoiser.unet_task(options.work, load_base(options), options.rank, objective, options.start)


def refine_task(options: argparse.Namespace) -> Task:
    """Goes on with the decoder on latents as the adapted UNet gives them."""
    base = load_base(options)
    drawing = denoiser.trained_denoiser(options.work, base, options.rank)
    return RefineTask(options.work, base.vae, drawing, Process(), options.start)


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "encoder": encoder_task,
    "decoder": decoder_task,
    "joint": joint_task,
    "unet": unet_task,
    "refine": refine_task,
}


def run_latents(options: argparse.Namespace) -> None:
    """Write the latents of the concept list as the encoder changes them."""
    latents = denoiser.adjusted_latents(options.work, load_base(options).vae, options.start)
    with replacing(options.work / "transparency" / "latents.safetensors") as temporary:
        save_file({"latents": latents.contiguous()}, temporary)
    report("latents", shape=tuple(latents.shape), rms=round(float((latents**2).mean().sqrt()), 3))


def run_export(options: argparse.Namespace) -> None:
    """Write what `--transparent` loads."""
    base = load_base(options)
    facts = export_transparency(options.work, base, options.out, options.rank, options.overwrite, options.start)
    report("export", out=str(options.out), **facts)


ALONE: dict[str, Callable[[argparse.Namespace], None]] = {"latents": run_latents, "export": run_export}


def run(options: argparse.Namespace) -> None:
    """Run one stage, or all in order; of several processes the first does what is not training."""
    if options.threads:
        torch.set_num_threads(options.threads)
    accelerator = make_accelerator(options)
    for stage in ORDER if options.stage == "all" else (options.stage,):
        if stage in TUNED:
            folder = options.work / "transparency" / stage
            train_stage(stage, folder, TASKS[stage], TUNED[stage], options, accelerator)
        elif accelerator.is_main_process:
            ALONE[stage](options)
        accelerator.wait_for_everyone()
