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
from pathlib import Path

from sticker.transparency.settings import ORDER, TUNED
from training_options import add_loop_options, add_rate_options, guarded, number, program

MODEL = Path(__file__).parent.parent / "diffusion_accel" / "assets" / "sticker"


def run(options: argparse.Namespace) -> None:
    """Run the stages that were asked for."""
    from sticker.transparency import stages  # heavy: torch

    stages.run(options)


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; the exit code."""
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
