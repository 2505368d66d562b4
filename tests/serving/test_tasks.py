"""One engine draws from prompts, from images and into masks: each as the pipeline of diffusers for that does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_folder import write_folder
from PIL import Image
from serving_tools import FOREVER, alone, mean_rows, request, same, served, sharing, sticker
from zoo import controlnet_model

from diffusion_accel import LatentTransparency, Reuse
from diffusion_accel.errors import ModelLoadError
from diffusion_accel.generation.loading import open_pipeline
from diffusion_accel.serving.engine import Engine


def picture(mode: str = "RGB") -> Image.Image:
    samples = np.random.default_rng(5).integers(0, 256, (6, 6, len(mode)), np.uint8)
    return Image.fromarray(samples).resize((48, 48))


MASK = Image.new("L", (48, 48))
MASK.paste(255, (0, 0, 24, 48))
TASKS: dict[str, dict[str, Any]] = {
    "text-to-image": {},
    "image-to-image": {"image": picture(), "strength": 0.7, "steps": 6},
    "inpainting": {"image": picture(), "mask_image": MASK, "strength": 1.0},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("features", [(), (Reuse(plan="hold:2"),)], ids=["", "held"])
def test_tasks(tmp_path: Path, features: Any) -> None:
    folder = str(write_folder(tmp_path))
    asked = [(request(seed, **changes), {"features": features}) for seed, changes in enumerate(TASKS.values())]
    with Engine(open_pipeline(folder, device="cpu"), running=3, wait=FOREVER) as engine:
        found = served(engine, asked)
        assert features or mean_rows(engine) > 2  # their steps are of one kind
    for one, (wanted, _), task in zip(found, asked, TASKS, strict=True):
        same(one.images, alone(open_pipeline(folder, device="cpu", task=task), wanted, features))


def test_a_controlnet_is_for_those_who_give_it_an_image(tmp_path: Path) -> None:
    """All that is asked with a control image shares batches of the ControlNet; the rest is drawn as without it."""
    folder, net = str(write_folder(tmp_path / "model")), str(tmp_path / "net")
    controlnet_model().save_pretrained(net)
    controlled = {"control_image": picture("RGBA").convert("RGB"), "controlnet_conditioning_scale": 1.5}
    asked = [(request(0, **TASKS["text-to-image"]), "text-to-image", {})]
    asked += [(request(seed, **TASKS[task], **controlled), task, controlled) for seed, task in enumerate(TASKS)]
    pipe = open_pipeline(folder, device="cpu", controlnet=net)
    with Engine(pipe, running=len(asked), wait=FOREVER) as engine:
        found = served(engine, [(one, {}) for one, _, _ in asked])
        assert {"controlnet", "unet"} <= sharing(engine)
        assert engine.stats()["calls"]["controlnet"] < engine.stats()["calls"]["unet"]
    for one, (wanted, task, more) in zip(found, asked, strict=True):
        options = {"controlnet": net} if more else {}
        same(one.images, alone(open_pipeline(folder, device="cpu", task=task, **options), wanted))
    assert not np.allclose(found[0].images, found[1].images)


def test_an_image_with_alpha() -> None:
    wanted = request(1, image=picture("RGBA"), strength=0.7)
    with Engine(sticker()) as engine:
        (found,) = served(engine, [(wanted, {"features": [LatentTransparency()]})])
        with pytest.raises(ModelLoadError, match="cannot do inpainting"):
            engine.submit(request(1, image=picture(), mask_image=MASK))
    same(found.images, alone(sticker(task="image-to-image"), wanted, [LatentTransparency()]))


def test_files_and_open_images_are_the_same(tmp_path: Path) -> None:
    picture("RGBA").save(tmp_path / "image.png")
    pipe = sticker(task="image-to-image")
    one, two = (alone(pipe, request(1, image=image)) for image in (tmp_path / "image.png", picture("RGBA")))
    assert (one == two).all()
