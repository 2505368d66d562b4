#!/usr/bin/env python3
"""Train the sticker classifier whose features `diffusion-accel evaluate` measures on.

    python scripts/train_sticker.py cache --data data/stickers --work runs/sticker
    python scripts/train_classifier.py --work runs/sticker --out diffusion_accel/assets/sticker-features

Writes the weights (float16), the class names, and the features of the real core stickers in four styles. Ctrl-C saves
the state; the same command with --resume goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from training_options import add_loop_options, add_rate_options, guarded, number, program

CONCEPTS = Path(__file__).parent / "data" / "sticker_concepts.txt"
TUNED: dict[str, Any] = {"steps": 3000, "batch": 64, "lr": 1.5e-3, "warmup": 200, "cooldown": 0.8, "weight_decay": 0.02}
TUNED |= {"ema": 0.998, "grid_every": 0, "eval_every": 250}


def run(options: argparse.Namespace) -> None:
    """Train the classifier, and write it."""
    from sticker import classifier  # heavy: torch

    classifier.run(options, TUNED)


def main(arguments: list[str] | None = None) -> int:
    """Train; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sticker"), help="work folder with the image cache")
    parser.add_argument("--out", type=Path, default=Path("runs/sticker/features"), help="folder to write")
    text = "file with the concepts that the embedded model is trained on"
    parser.add_argument("--concepts", type=Path, default=CONCEPTS, help=text)
    parser.add_argument("--steps", type=number(1), help=f"budget in steps (default: {TUNED['steps']})")
    parser.add_argument("--seed", type=number(0), default=0)
    parser.add_argument("--threads", type=number(1), help="CPU threads per process (default: torch's choice)")
    add_rate_options(parser, TUNED)
    add_loop_options(parser)
    return guarded(run, parser.parse_args(arguments))


if __name__ == "__main__":
    program(main)
