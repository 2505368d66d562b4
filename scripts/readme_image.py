#!/usr/bin/env python3
"""The README's picture: the same prompts and seeds with settings of its table, and with alpha.

python scripts/readme_image.py -o docs/images/readme.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from measuring import STICKER, quiet
from PIL import Image
from report import HERE, LEARNED

from diffusion_accel import LatentTransparency, Reuse, accelerate
from diffusion_accel.compositing import checkerboard, over
from diffusion_accel.image_files import save_image
from diffusion_accel.measure.grids import grid
from diffusion_accel.pipelines.schedulers import set_scheduler

PROMPTS = {
    "red apple, 3d style": 0,
    "hamburger, flat style": 0,
    "tiger face, noto style": 0,
    "panda, twemoji style": 0,
    "rocket, flat style": 4,
    "sunflower, twemoji style": 5,
    "rainbow, 3d style": 0,
}
#: what a row says, its number in docs/data/readme.json, scheduler, steps and features
ROWS: tuple[tuple[str, str, str, int, tuple[Any, ...]], ...] = (
    ("20 steps of DPM-Solver++", "baseline", "dpm++", 20, ()),
    ("--reuse tuned:balanced", "reuse tuned:balanced", "dpm++", 20, (Reuse(plan="tuned:balanced"),)),
    ("--scheduler learned --steps 5", LEARNED, "learned", 5, ()),
    ("--transparent", "", "dpm++", 20, (LatentTransparency(),)),
)


def drawn(scheduler: str, steps: int, features: tuple[Any, ...]) -> list[Image.Image]:
    """All prompts with a setting; alpha over a checkerboard."""
    pipe = quiet("sticker")
    set_scheduler(pipe, scheduler)
    accelerate(pipe, *features)
    images = []
    for prompt, seed in PROMPTS.items():
        generator = torch.Generator().manual_seed(seed)
        image = pipe(prompt, num_inference_steps=steps, generator=generator, **STICKER).images[0]
        images.append(over(image, checkerboard(image.size)) if image.mode == "RGBA" else image)
    return images


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    data = json.loads((HERE / "docs/data/readme.json").read_text(encoding="utf-8"))
    ratios = {row["name"]: row["time_ratio"] for row in data["rows"] if "time_ratio" in row}
    rows, captions = [], []
    for says, name, scheduler, steps, features in ROWS:
        rows.append(drawn(scheduler, steps, features))
        captions.append([f"{says}: {ratios[name]:.1f} times as fast" if ratios.get(name, 1.0) != 1.0 else says])
    columns = [prompt.split(",")[0] for prompt in PROMPTS]
    save_image(grid(rows, columns, captions), options.output)


if __name__ == "__main__":
    main()
