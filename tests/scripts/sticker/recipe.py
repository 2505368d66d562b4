"""A tiny data set of drawings, and the stages of the recipe on it: what the tests of this folder share."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file
from sticker import settings as stage_settings
from sticker import stages
from sticker.transparency import settings as transparency_settings

from diffusion_accel.training.files import read_json_lines
from diffusion_accel.training.loop import Settings

SCRIPTS = Path(__file__).parents[3] / "scripts"
CONCEPTS = ("red disc", "blue disc", "green ring", "yellow square", "orange ring", "pink square")
COLOURS = ((220, 40, 40), (40, 60, 220), (40, 180, 60), (230, 210, 40), (240, 140, 30), (240, 120, 180))
SIZE = 48
STAGES = ("decoder", "text", "denoiser", "finish")
TINY = {
    "size": SIZE,
    "vae_channels": [16, 32, 64, 64],
    "vocabulary": 560,
    "unet_channels": [32, 64],
    "unet_groups": 8,
    "text_width": 32,
    "text_layers": 1,
}


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that one worker makes while the others wait for it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            making = folder.with_name(f"{name}.making")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            make(making)
            making.rename(folder)
    return folder


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


trainer = load_script("train_sticker")


def draw_image(index: int, soft: float) -> Image.Image:
    """A disc, ring or square with soft edges and a shaded fill."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
    distance = np.maximum(abs(x), abs(y)) if index in (3, 5) else np.hypot(x, y)
    alpha = 1 / (1 + np.exp((distance - 0.3) * soft))
    if index in (2, 4):
        alpha *= 1 / (1 + np.exp((0.15 - distance) * soft))
    shade = (0.8 + 0.4 * x + 0.2 * np.sin(9 * y + index))[..., None]
    rgb = np.clip(np.array(COLOURS[index]) * shade, 0, 255)
    return Image.fromarray(np.concatenate([rgb, alpha[..., None] * 255], -1).astype(np.uint8), "RGBA")


def write_data(folder: Path) -> None:
    """Six concepts in two core styles and another one; one image is held out."""
    rows = []
    for style, soft in (("flat", 120.0), ("3d", 30.0), ("blob", 60.0)):
        with zipfile.ZipFile(folder / f"{style}.zip", "w") as archive:
            for i, name in enumerate(CONCEPTS):
                file = io.BytesIO()
                draw_image(i, soft).save(file, "WEBP", lossless=True)
                archive.writestr(f"{i}.webp", file.getvalue())
                rows.append(
                    {"id": f"{style}/{i}", "style": style, "style_words": style, "slug": name.replace(" ", "-")}
                    | {"name": name, "keywords": [name.split()[0], "shape"], "group": "objects", "subgroup": "toys"}
                    | {"core": style != "blob", "starter": True, "file": f"{style}.zip:{i}.webp"}
                    | {"split": "heldout" if (style, i) == ("3d", 2) else "train"}
                )
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "concepts.txt").write_text("# all\n" + "\n".join(row["slug"] for row in rows[:6]) + "\n")
    (folder / "shape.json").write_text(json.dumps(TINY))


@contextlib.contextmanager
def small_batches(tuned: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Steps of at most eight images, in place of the tuned number of them."""
    with contextlib.ExitStack() as patches:
        for stage in tuned.values():
            patches.enter_context(mock.patch.dict(stage, batch=min(8, stage["batch"])))
        yield


def train_all(data: Path, folder: Path) -> None:
    """All stages, with the exported pipeline in ``pipeline``."""
    steps = [f"--{stage}-steps=3" for stage in STAGES]
    files = ["--data", str(data), "--work", str(folder), "--shape", str(data / "shape.json")]
    chosen = ["--styles", "flat,3d", "--concepts", str(data / "concepts.txt"), "--around", "blob"]
    drawn = ["--sampling-steps", "2", "--count", "4", "--prompts", "red disc|blue disc"]
    with small_batches(stage_settings.TUNED):
        assert trainer.main(["all", *files, *chosen, *drawn, "--log-every", "1", "--grid-every", "3", *steps]) == 0


def train_transparency(work: Path, out: Path) -> None:
    """All stages of transparency, on a work folder after all stages of the recipe."""
    steps = [f"--{stage}-steps=3" for stage in ("encoder", "decoder", "joint", "unet", "refine")]
    common = ["--work", str(work), "--model", str(work / "pipeline"), "--out", str(out), "--rank", "4"]
    flags = ["--log-every", "1", "--eval-every", "3", "--grid-every", "0"]
    with small_batches(transparency_settings.TUNED):
        assert load_script("train_transparency").main(["all", *common, *steps, *flags]) == 0


def denoiser_task(work: Path) -> Any:
    return stages.denoiser_task(trainer.make_parser().parse_args(["denoiser", "--work", str(work)]))


def settings(**changes: Any) -> Settings:
    defaults: dict[str, Any] = {"steps": 6, "batch": 4, "lr": 1e-3, "log_every": 2, "eval_every": 3, "grid_every": 0}
    return Settings(**(defaults | changes))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / json.loads((folder / "state.json").read_text())["tensors"])


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = read_json_lines(folder / "log.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
