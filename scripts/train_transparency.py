#!/usr/bin/env python3
"""Train latent transparency for the sticker model: encoder and decoder, and a low-rank update of its UNet.

    python scripts/train_sticker.py cache --data data/stickers --work runs/sticker
    python scripts/train_transparency.py all --work runs/sticker --out runs/sticker/transparency/out

Stages, each of which reads what the ones before it left in the work folder:
    encoder    trains the encoder before the frozen VAE
    decoder    trains the decoder behind it
    joint      goes on with both together
    latents    the latents of the concept list as the encoder changes them
    unet       trains the low-rank update that makes the UNet draw such latents
    refine     goes on with the decoder on latents as that UNet gives them
    export     writes what `--transparent` loads: encoder, decoder and update, float16 safetensors
    all        all of them, in this order

Ctrl-C saves the state; the same command with --resume goes on exactly where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_accel.training.arguments import (
    add_loop_options,
    add_rate_options,
    exit_if_stopped,
    guarded,
    make_accelerator,
    number,
    program,
    report,
    settings_from,
)

MODEL = Path(__file__).parent.parent / "diffusion_accel" / "assets" / "sticker"

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffusion_accel.training.loop import Task

ENCODER: dict[str, Any] = {"steps": 1500, "batch": 16, "lr": 1.5e-3, "warmup": 100, "cooldown": 0.8, "curve": "cosine"}
ENCODER |= {"ema": 0.998, "weight_decay": 1e-3, "eval_every": 250, "grid_every": 0}
DECODER = ENCODER | {"steps": 8000, "grid_every": 500}
JOINT = DECODER | {"steps": 4000, "batch": 8, "lr": 1e-3, "cooldown": 0.7}
UNET: dict[str, Any] = {"steps": 3000, "batch": 64, "lr": 1.5e-3, "warmup": 100, "cooldown": 0.8, "curve": "cosine"}
UNET |= {"eval_every": 250, "grid_every": 500}
REFINE = DECODER | {"steps": 1600, "batch": 8, "lr": 6e-4, "warmup": 50, "cooldown": 0.9}
TUNED = {"encoder": ENCODER, "decoder": DECODER, "joint": JOINT, "unet": UNET, "refine": REFINE}
ORDER = ("encoder", "decoder", "joint", "latents", "unet", "refine", "export")


def load_base(options: argparse.Namespace) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(options.model, use_safetensors=True)


def encoder_task(options: argparse.Namespace) -> Task:
    from sticker.transparency import EncoderTask

    return EncoderTask(options.work, load_base(options).vae, options.start)


def decoder_task(options: argparse.Namespace) -> Task:
    from sticker.transparency import DecoderTask

    return DecoderTask(options.work, load_base(options).vae, options.start)


def joint_task(options: argparse.Namespace) -> Task:
    from sticker.transparency import JointTask

    return JointTask(options.work, load_base(options).vae, options.start)


def unet_task(options: argparse.Namespace) -> Task:
    from sticker.transparency import unet_task

    from diffusion_accel.training.denoising import Process
    from diffusion_accel.training.diffusion_task import Objective
    from diffusion_accel.training.noise import NoiseChoice

    objective = Objective(process=Process(), noise=NoiseChoice("knn", 4), uniform=0.4)
    return unet_task(options.work, load_base(options), options.rank, objective, options.start)


def refine_task(options: argparse.Namespace) -> Task:
    from sticker.transparency import RefineTask, trained_denoiser

    from diffusion_accel.training.denoising import Process

    base = load_base(options)
    denoiser = trained_denoiser(options.work, base, options.rank)
    return RefineTask(options.work, base.vae, denoiser, Process(), options.start)


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "encoder": encoder_task,
    "decoder": decoder_task,
    "joint": joint_task,
    "unet": unet_task,
    "refine": refine_task,
}


def run_training(stage: str, options: argparse.Namespace, accelerator: Accelerator) -> None:
    from diffusion_accel.training.loop import train

    folder = options.work / "transparency" / stage
    settings = settings_from(TUNED[stage], options, getattr(options, f"{stage}_steps"))
    if options.overwrite and not options.resume and accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    outcome = train(TASKS[stage](options), folder, settings, accelerator, resume=options.resume)
    if accelerator.is_main_process:
        report(stage, step=outcome.step, steps=settings.steps, finished=outcome.finished)
    exit_if_stopped(outcome, accelerator)


def run_latents(options: argparse.Namespace) -> None:
    from safetensors.torch import save_file
    from sticker.transparency import adjusted_latents

    from diffusion_accel.training.files import replacing

    latents = adjusted_latents(options.work, load_base(options).vae, options.start)
    with replacing(options.work / "transparency" / "latents.safetensors") as temporary:
        save_file({"latents": latents.contiguous()}, temporary)
    report("latents", shape=tuple(latents.shape), rms=round(float((latents**2).mean().sqrt()), 3))


def run_export(options: argparse.Namespace) -> None:
    from sticker.transparency import export_transparency

    base = load_base(options)
    facts = export_transparency(options.work, base, options.out, options.rank, options.overwrite, options.start)
    report("export", out=str(options.out), **facts)


ALONE: dict[str, Callable[[argparse.Namespace], None]] = {"latents": run_latents, "export": run_export}


def run(options: argparse.Namespace) -> None:
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    accelerator = make_accelerator(options)
    for stage in ORDER if options.stage == "all" else (options.stage,):
        if stage in TUNED:
            run_training(stage, options, accelerator)
        elif accelerator.is_main_process:
            ALONE[stage](options)
        accelerator.wait_for_everyone()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage in (*ORDER, "all"):
        sub = stages.add_parser(stage, help="every stage in order" if stage == "all" else f"the {stage} stage")
        sub.add_argument("--work", type=Path, default=Path("runs/sticker"), help="work folder (default: %(default)s)")
        text = "the pipeline folder that becomes transparent (default: the embedded model)"
        sub.add_argument("--model", type=Path, default=MODEL, help=text)
        text = "transparency weights to begin with where no earlier stage has left any (default: random ones)"
        sub.add_argument("--from", dest="start", type=Path, metavar="DIR", help=text)
        text = "folder to write (default: WORK/transparency/out)"
        sub.add_argument("--out", type=Path, help=text)
        sub.add_argument("--threads", type=number(1), help="CPU threads per process (default: torch's choice)")
        sub.add_argument("--seed", type=number(0), default=0, help="seed (default: 0)")
        sub.add_argument("--overwrite", action="store_true", help="start again, replacing what is there")
        sub.add_argument("--rank", type=number(1), default=32, help="of the UNet's update (default: 32)")
        for name in TUNED if stage == "all" else {stage} & set(TUNED):
            flag = f"--{name}-steps" if stage == "all" else "--steps"
            text = f"budget of the {name} stage in steps (default: {TUNED[name]['steps']})"
            sub.add_argument(flag, dest=f"{name}_steps", type=number(1), help=text)
        if stage in TUNED:
            add_rate_options(sub, TUNED[stage])
        add_loop_options(sub)
    options = parser.parse_args(arguments)
    options.out = options.out or options.work / "transparency" / "out"
    return guarded(run, options)


if __name__ == "__main__":
    program(main)
