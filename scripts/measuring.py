"""What the programs that measure share: a loaded pipeline, the numbers of a row, tables, and files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from diffusion_accel.io import replacing
from diffusion_accel.measure.fidelity import psnr, spread
from diffusion_accel.pipelines.loading import load_pipeline

STICKER = {"guidance_scale": 3.0, "height": 96, "width": 96}  # how the embedded model is called
MOST = 200.0  # dB, of equal images


def quiet(model: str) -> Any:
    """A pipeline on one thread that says nothing."""
    torch.set_num_threads(1)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def numbers(wanted: torch.Tensor, images: torch.Tensor) -> dict[str, Any]:
    """How near images are: median, worst decile and worst of their PSNR in dB, and each."""
    values = psnr(wanted, images.nan_to_num()).clamp(max=MOST)
    median, worst = spread(values)
    return {
        "median": round(median, 2),
        "worst_decile": round(worst, 2),
        "worst": round(float(values.min()), 2),
        "each": [round(float(v), 2) for v in values],
    }


def short(row: dict[str, Any], worst: bool = False) -> str:
    """Median and worst decile (and the worst) as a cell of a table."""
    keys = ("median", "worst_decile", "worst")[: 3 if worst else 2]
    return " / ".join(f"{row[key]:.1f}" for key in keys)


def line(*cells: object) -> None:
    """Print one row of a Markdown table."""
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)


def head(*names: str) -> None:
    """Print the first two rows of one."""
    line(*names)
    line(*["---"] * len(names))


def write(file: Path | None, settings: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """All numbers, image by image, as JSON; without a file nothing."""
    if file is not None:
        with replacing(file) as path:
            text = json.dumps(settings | {"torch": torch.__version__, "rows": list(rows)}, indent=1)
            path.write_text(text, encoding="utf-8")
