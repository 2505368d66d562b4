#!/usr/bin/env python3
"""Train the sticker classifier whose features `diffusion-accel evaluate` measures on.

    python scripts/train_sticker.py cache --data data/stickers --work runs/sticker
    python scripts/train_classifier.py --work runs/sticker --out diffusion_accel/assets/sticker-features

Writes the weights (float16), the class names, and the features of the real core stickers in four styles. Ctrl-C saves
the state; the same command with --resume goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

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

CONCEPTS = Path(__file__).parent / "data" / "sticker_concepts.txt"
STYLES = ("noto", "flat", "3d", "twemoji")
TUNED: dict[str, Any] = {"steps": 3000, "batch": 64, "lr": 1.5e-3, "warmup": 200, "cooldown": 0.8, "weight_decay": 0.02}
TUNED |= {"ema": 0.998, "grid_every": 0, "eval_every": 250}


def run(options: argparse.Namespace) -> None:
    import torch
    from safetensors.torch import save_file
    from sticker import data as sticker_data
    from sticker.classifier import ClassifierTask

    from diffusion_accel.evaluation.classifier import save_classifier
    from diffusion_accel.training import archives
    from diffusion_accel.training.loop import train
    from diffusion_accel.training.state import load_average

    if options.threads:
        torch.set_num_threads(options.threads)
    accelerator = make_accelerator(options)
    task, folder = ClassifierTask(options.work), options.work / "classifier"
    settings = settings_from(TUNED, options, options.steps)
    outcome = train(task, folder, settings, accelerator, resume=options.resume)
    exit_if_stopped(outcome, accelerator)
    if not outcome.finished or not accelerator.is_main_process:
        return
    load_average(folder, task.model, "classifier")
    task.model.half().float().eval()  # the features of the weights as they are written
    save_classifier(task.model, options.out)
    chosen = sticker_data.select(task.rows, STYLES)
    with torch.no_grad():
        accuracy, reference = task.evaluate(), task.features(chosen)
    save_file({"features": reference.values.half().contiguous()}, options.out / "reference.safetensors")
    drawn = set(sticker_data.read_concepts(options.concepts))
    rows = [task.rows[i] for i in chosen]
    known = {
        "concepts": reference.concepts,
        "styles": reference.styles,
        "captions": [archives.caption_variants(row)[0] for row in rows],
        "splits": [row["split"] if row["slug"] in drawn else "" for row in rows],
    }
    (options.out / "reference.json").write_text(json.dumps(known) + "\n", encoding="utf-8")
    report("classifier", step=outcome.step, out=str(options.out), reference=len(reference), **accuracy)


def main(arguments: list[str] | None = None) -> int:
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
