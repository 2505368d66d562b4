#!/usr/bin/env python3
"""Train a diffusion model on a folder of images, and write it as a diffusers pipeline.

    python scripts/train_diffusion.py --data photos/ --model unet --size 32 --work runs/photos
    python scripts/train_diffusion.py --data classes/ --model dit --size 96 --vae sticker --task-routing
    python scripts/train_diffusion.py --data captioned/ --model unet-text --size 96 --vae sticker --immiscible knn:4

The data folder holds images, a folder of images for each class, or captions.jsonl (file and caption in each line).
Models: UNet2DModel (unet), UNet2DConditionModel (unet-text) and DiTTransformer2DModel (dit), in pixels or, with --vae,
in latents. Predictions: epsilon, v_prediction, flow. The training accelerators combine freely.

Several processes: torchrun --nproc-per-node 2 scripts/train_diffusion.py ... or accelerate launch. Ctrl-C saves the
state; the same command with --resume goes on exactly where it stopped.

Exit codes: 0 done, 1 failed, 2 wrong arguments, 130 or 143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from training_options import (
    add_loop_options,
    add_objective_options,
    add_rate_options,
    guarded,
    number,
    program,
)

TUNED: dict[str, Any] = {"steps": 5000, "batch": 32, "lr": 1e-3, "warmup": 150}


def make_parser() -> argparse.ArgumentParser:
    """The options of the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--kind", choices=("folder", "classes", "captions"), help="what it holds (default: look)")
    parser.add_argument("--work", type=Path, default=Path("runs/diffusion"), help="work folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="pipeline folder to write (default: WORK/pipeline)")
    parser.add_argument("--model", choices=("unet", "unet-text", "dit"), required=True)
    parser.add_argument("--model-config", type=Path, help="JSON file with settings of the diffusers model to change")
    parser.add_argument("--size", type=number(8), default=64, help="image side in pixels (default: %(default)s)")
    parser.add_argument("--vae", type=Path, help="train in the latents of this VAE: a folder, or sticker")
    parser.add_argument("--text", type=Path, help="pipeline folder, or sticker, to take the text encoder from")
    parser.add_argument("--freeze-text", action="store_true", help="leave the text encoder as it is")
    parser.add_argument("--init", type=Path, help="start from the weights of this folder (unet or transformer)")
    parser.add_argument(
        "--heldout", type=number(0, float), default=0.05, help="share kept for evaluation (default: 0.05)"
    )
    parser.add_argument("--fp32", action="store_true", help="write float32 weights instead of float16")
    parser.add_argument("--overwrite", action="store_true", help="start again, replacing what is there")
    parser.add_argument("--seed", type=number(0), default=0, help="seed (default: 0)")
    parser.add_argument("--threads", type=number(1), help="CPU threads per process (default: torch's choice)")
    loop = parser.add_argument_group("training")
    loop.add_argument("--steps", type=number(1), help=f"budget in steps (default: {TUNED['steps']})")
    add_rate_options(loop, TUNED)
    add_loop_options(loop)
    group = parser.add_argument_group("objective")
    group.add_argument("--prediction", choices=("epsilon", "v_prediction", "flow"), default="v_prediction")
    text = "betas of the noise schedule (default: linear)"
    group.add_argument("--schedule", choices=("linear", "scaled_linear", "cosine"), default="linear", help=text)
    text = "share of empty conditions, for guidance (default: 0.1)"
    group.add_argument("--dropout", type=number(0, float), default=0.1, help=text)
    group.add_argument("--uniform", type=number(0, float), default=1.0, help="share of uniform timesteps (default: 1)")
    text = "centre of the other timesteps, which are logit-normal (default: 0)"
    group.add_argument("--t-mean", type=float, default=0.0, help=text)
    add_objective_options(group)
    text = "measure the task affinities of the trained weights, write them and exit"
    group.add_argument("--measure-affinity", type=Path, metavar="FILE", help=text)
    return parser


def run(options: argparse.Namespace) -> None:
    """Prepare the data, train, and write the pipeline."""
    import training_run  # heavy: torch

    training_run.run(options, TUNED)


def main(arguments: list[str] | None = None) -> int:
    """Train; the exit code."""
    return guarded(run, make_parser().parse_args(arguments))


if __name__ == "__main__":
    program(main)
