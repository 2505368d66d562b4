"""A request is drawn as the pipeline's own call with the same seeds is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import model_folder
import numpy as np
import pytest
import torch
import zoo
from diffusers import ControlNetModel, StableDiffusionInpaintPipeline
from model_folder import write_folder
from PIL import Image
from zoo import controlnet_model

from diffusion_accel import EncoderReuse, accelerate
from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.generation.drawing import check_requests, draw, prepare
from diffusion_accel.generation.loading import open_pipeline
from diffusion_accel.generation.request import Request
from diffusion_accel.pipelines.loading import as_task

REQUEST = Request(prompt="red apple, 3d style", seed=3, count=2, steps=2, guidance_scale=3.0)


@pytest.fixture(scope="module")
def pipe() -> object:
    made = open_pipeline("sticker", device="cpu", scheduler="ddim", features=[EncoderReuse.neutral()])
    made.set_progress_bar_config(disable=True)
    return made


def test_as_the_pipeline_draws(pipe: object) -> None:
    found = draw(pipe, REQUEST)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    wanted = pipe(  # type: ignore[operator]
        REQUEST.prompt, num_inference_steps=2, guidance_scale=3.0, num_images_per_prompt=2, generator=generators
    ).images
    assert all(np.array_equal(a, b) for a, b in zip(found.images, wanted, strict=True))
    assert found.report.steps == 2 and found.comparison is None


def test_compared_with_itself_without_features(pipe: object) -> None:
    found = draw(pipe, dataclasses.replace(REQUEST, count=1), comparing=True)
    assert found.comparison is not None and found.comparison.psnr == [float("inf")]


def test_notes(pipe: object) -> None:
    assert prepare(pipe, REQUEST).notes() == []
    odd = dataclasses.replace(REQUEST, width=256, height=256, prompt="apple " * 40)
    size, prompt = prepare(pipe, odd).notes()
    assert "trained for 96x96 pixels; at 256x256" in size and "the model reads the first 24" in prompt


def test_what_the_pipeline_does_not_take(pipe: object, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with_image = dataclasses.replace(REQUEST, image=tmp_path / "a.png", strength=0.5)
    for check in (lambda: check_requests(pipe, [REQUEST, with_image]), lambda: draw(pipe, with_image)):
        with pytest.raises(ConfigurationError, match="StableDiffusionPipeline does not take strength, image"):
            check()


def test_what_the_pipeline_needs(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    parts: dict[str, Any] = dict(zoo.inpaint()[0].components)
    parts |= {"text_encoder": model_folder.text_encoder(), "tokenizer": model_folder.tokenizer()}
    made: Any = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    pipe = accelerate(made)
    for request, names in (
        (Request(prompt="red", steps=2), "image, mask_image"),
        (Request(prompt="red", steps=2, image=tmp_path / "a.png"), "mask_image"),
    ):
        with pytest.raises(ConfigurationError, match=f"StableDiffusionInpaintPipeline needs {names}$"):
            check_requests(pipe, [request])
    check_requests(pipe, [Request(prompt="red", steps=2, image=tmp_path / "a.png", mask_image=tmp_path / "a.png")])
    with pytest.raises(ModelLoadError, match="this model only inpaints"):
        as_task(made, "image-to-image")


def test_as_many_control_images_as_controlnets(tmp_path: Path) -> None:
    write_folder(tmp_path / "model")
    for number in range(2):
        controlnet_model(number).save_pretrained(tmp_path / f"net{number}")
    nets = [tmp_path / "net0", tmp_path / "net1"]
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    one = Request(prompt="red", seed=1, steps=2, control_image=images[0])
    two = dataclasses.replace(one, control_image=images)
    for count, fits, other in ((1, one, two), (2, two, one)):
        made = open_pipeline(str(tmp_path / "model"), controlnet=nets[:count], device="cpu")
        made.set_progress_bar_config(disable=True)
        assert draw(made, fits).images[0].size == (16, 16)
        whole = dataclasses.replace(fits, controlnet_conditioning_scale=1)
        assert np.array_equal(draw(made, whole).images[0], draw(made, fits).images[0])
        words = f"one for each of the pipeline's ControlNets, in their order: {count}, got {3 - count}"
        missing = "control_image is needed: the pipeline has a ControlNet"
        for asked, why in ((other, words), (dataclasses.replace(one, control_image=None), missing)):
            for check in (lambda: check_requests(made, [asked]), lambda: draw(made, asked)):  # noqa: B023
                with pytest.raises(ConfigurationError, match=why):
                    check()
    made.register_modules(controlnet=ControlNetModel.from_unet(made.unet, conditioning_channels=1))
    with pytest.raises(
        ConfigurationError, match="control_image has 3 channels, and a ControlNet of the pipeline takes 1"
    ):
        draw(made, one)
