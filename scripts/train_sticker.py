#!/usr/bin/env python3
"""Train the sticker model, a small text-to-image StableDiffusionPipeline, from the sticker data set.

    python scripts/train_sticker.py all --data data/stickers --work runs/sticker --out runs/sticker/pipeline

Stages, each of which reads what the ones before it left in the work folder:
    cache      zips -> one uint8 array
    tokenizer  byte-level BPE in CLIP's format
    latents    principal components of 8x8 patches: the latents of the chosen images
    decoder    trains the VAE's decoder
    text       pre-trains the text encoder
    denoiser   trains the UNet or transformer with the text encoder, on the concept list and the images around it
    finish     goes on from its averaged weights, on the concept list alone
    export     writes the diffusers folder
    grid       writes a grid of samples
    evaluate   prediction error by noise level, and retrieval
    all        all of them, in this order

`decoder` and `text` may run at the same time. Ctrl-C saves the state; the same command with --resume goes on exactly
where it stopped. Two processes on a CPU (`accelerate launch --cpu` starts a single one unless it has mpirun):

    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 scripts/train_sticker.py denoiser --threads 1

Exit codes: 0 done, 1 failed, 2 wrong arguments, 130 or 143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sticker.settings import ORDER, TUNED
from training_options import (
    add_loop_options,
    add_objective_options,
    add_rate_options,
    guarded,
    number,
    program,
)

CONCEPTS = Path(__file__).parent / "data" / "sticker_concepts.txt"
STYLES = "noto,flat,3d,twemoji"
AROUND = "blob,emojitwo"  # further styles to train on; gradient is left out, a near twin of 3d
GRID_CONCEPTS = "red apple|banana|strawberry|cherries|red heart|blue heart|tiger face|panda|penguin|frog|rainbow|rocket"


def add_training_options(parser: argparse.ArgumentParser, stages: list[str]) -> None:
    """Options of the stages that are trained; those of all together have the stage's name in their budgets."""
    group = parser.add_argument_group("training")
    for stage in stages:
        flag = "--steps" if len(stages) == 1 else f"--{stage}-steps"
        text = f"budget of the {stage} stage in steps (default: {TUNED[stage]['steps']})"
        group.add_argument(flag, dest=f"{stage}_steps", type=number(1), help=text)
    if len(stages) == 1:
        add_rate_options(group, TUNED[stages[0]])
    add_loop_options(group)
    if len(stages) == 1 and "text" not in stages:
        text = "begin with the weights of another pipeline: an embedded model's name, or a folder"
        group.add_argument("--start", metavar="MODEL", help=text)
    parser.set_defaults(start=None)
    if "decoder" in stages:
        group.add_argument("--crop", type=number(8), default=48, help="side of the decoder's crops (default: 48)")
        text = "largest latent noise of the decoder's input (default: 0.3)"
        group.add_argument("--latent-noise", type=number(0, float), default=0.3, help=text)
    if {"denoiser", "finish"} & set(stages):
        add_objective_options(group, immiscible="knn:4")
        text = "centre of the logit-normal timesteps (default: 0)"
        group.add_argument("--t-mean", type=float, default=0.0, help=text)
        text = "compile the blocks of a transformer with torch.compile: a minute of waiting, then faster steps"
        group.add_argument("--compile", action="store_true", help=text)
        group.add_argument("--fresh-text", action="store_true", help="start from an untrained text encoder")


def make_parser() -> argparse.ArgumentParser:
    """The options of the program, a command a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage in (*ORDER, "all"):
        sub = stages.add_parser(stage, help="every stage in order" if stage == "all" else f"the {stage} stage")
        sub.add_argument("--work", type=Path, default=Path("runs/sticker"), help="work folder (default: %(default)s)")
        sub.add_argument("--threads", type=number(1), help="CPU threads per process (default: torch's choice)")
        sub.add_argument("--seed", type=number(0), default=0, help="seed (default: 0)")
        whole = stage == "all"
        if whole or stage == "cache":
            text = "data set folder (default: %(default)s)"
            sub.add_argument("--data", type=Path, default=Path("data/stickers"), help=text)
            sub.add_argument("--shape", type=Path, help="JSON file with other model sizes and settings")
        if whole or stage in ("latents", "evaluate", "grid"):
            text = "file with the concepts to train on (default: the 369 of the embedded model)"
            sub.add_argument("--concepts", type=Path, default=CONCEPTS, help=text)
        if whole or stage in ("latents", "evaluate", "grid"):
            sub.add_argument("--styles", default=STYLES, help="styles, separated by commas (default: %(default)s)")
        if whole or stage == "latents":
            text = "train on every core concept, in these styles too, a third as often; '' for the list alone"
            sub.add_argument("--around", default=AROUND, help=f"{text} (default: %(default)s)")
        if whole or stage in TUNED:
            add_training_options(sub, list(TUNED) if whole else [stage])
        if whole or stage in TUNED or stage == "export":
            sub.add_argument("--overwrite", action="store_true", help="start again, replacing what is there")
        if whole or stage in ("export", "grid", "evaluate"):
            text = "pipeline folder (default: WORK/pipeline)"
            sub.add_argument("--out", "--pipeline", dest="out", type=Path, help=text)
        if whole or stage in ("grid", "evaluate"):
            sub.add_argument("--sampling-steps", type=number(1), default=20, help="DPM-Solver++ steps (default: 20)")
            sub.add_argument("--guidance", type=number(0, float), default=3.0, help="guidance scale (default: 3)")
        if whole or stage == "grid":
            sub.add_argument("--prompts", default=GRID_CONCEPTS, help="prompts or concepts, separated by |")
            text = "take the prompts as they are; otherwise each is drawn in every style"
            sub.add_argument("--plain", dest="by_style", action="store_false", help=text)
            text = "draw every concept of the list instead: a WebP file a style, in the folder --grid"
            sub.add_argument("--every", action="store_true", help=text)
            sub.add_argument("--columns", type=number(1), default=12, help="images in a row (default: 12)")
            sub.add_argument("--grid", type=Path, help="PNG file to write (default: WORK/grid.png)")
        if whole or stage == "evaluate":
            sub.add_argument("--count", type=number(1), default=96, help="generated images per split (default: 96)")
            text = "retrieval looks among the starter or all core concepts (default: starter)"
            sub.add_argument("--candidates", choices=("starter", "core"), default="starter", help=text)
    return parser


def run(options: argparse.Namespace) -> None:
    """Run the stages that were asked for."""
    from sticker import stages  # heavy: torch

    stages.run(options)


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; the exit code."""
    options = make_parser().parse_args(arguments)
    if getattr(options, "out", 0) is None:
        options.out = options.work / "pipeline"
    return guarded(run, options)


if __name__ == "__main__":
    program(main)
