"""Images before they are finished."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import zoo
from serving_tools import TIMEOUT, generator, request, sticker

from diffusion_accel import LatentTransparency, Reuse
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.generation.partial import clean, steps_of
from diffusion_accel.serving.engine import Engine


def test_behind_which_steps() -> None:
    assert steps_of(0, 10) == [] and steps_of(1, 10) == [5] and steps_of(3, 20) == [5, 10, 15]
    assert steps_of(3, 2) == [1] and steps_of(16, 1) == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scheduler", ["euler", "learned"])
def test_nearer_towards_the_end(scheduler: str) -> None:
    pipe = sticker(features=[LatentTransparency(views=1)], scheduler=scheduler)
    seen: list[Any] = []
    steps = 6 if scheduler != "learned" else min(pipe.scheduler.evaluations)
    asked = request(1, steps=steps)
    with Engine(pipe, running=1) as engine:
        last = engine.submit(asked, partial_images=3, on_partial=seen.append).result(TIMEOUT).images
    assert [one.index for one in seen] == list(range(len(seen))) and len(seen) >= 2
    errors = [
        np.mean([(np.asarray(a, float) - np.asarray(b, float)) ** 2 for a, b in zip(one.images, last, strict=True)])
        for one in seen
    ]
    assert all(image.mode == "RGBA" and image.size == (48, 48) for one in seen for image in one.images)
    assert errors[-1] < errors[0] / 2


def test_nothing_else_changes() -> None:
    pipe = sticker(features=[Reuse(plan="hold:2")])
    found = []
    with Engine(pipe, running=1) as engine:
        for count in (0, 2):
            handle = engine.submit(request(1), partial_images=count, on_partial=lambda one: None)
            found.append(np.asarray(handle.result(TIMEOUT).images[0]))
    assert np.array_equal(*found)


def test_the_last_step_of_ddim_is_the_image() -> None:
    """An independent formula: with alpha 1 behind it, DDIM's last step is the clean sample."""
    pipe = zoo.sd()[0]
    pipe.scheduler.set_timesteps(4)
    x, value, time = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), pipe.scheduler.timesteps[-1]
    estimate = pipe.scheduler.step(value, time, x).pred_original_sample
    for args, kwargs in [((value, time, x), {}), ((value,), {"sample": x, "timestep": time})]:
        assert torch.allclose(clean(pipe.scheduler, pipe.scheduler.step, args, kwargs), estimate, atol=1e-5)


def test_packed_latents() -> None:
    pipe, call = zoo.flux()
    pipe.set_progress_bar_config(disable=True)
    seen: list[Any] = []
    with Engine(pipe, running=1) as engine:
        asked = {**call, "num_inference_steps": 4, "generator": generator(1)}
        engine.submit(asked, partial_images=1, on_partial=seen.append).result(TIMEOUT)
    assert [(one.index, one.step, one.steps) for one in seen] == [(0, 2, 4)]
    assert seen[0].images[0].size == (call["width"], call["height"])


def test_where_there_are_none() -> None:
    pipe, call = zoo.unet2d()
    with Engine(pipe, running=1) as engine:
        with pytest.raises(ConfigurationError, match="no partial_images: it has no VAE"):
            engine.submit({"num_inference_steps": 2}, partial_images=1)
        with pytest.raises(ConfigurationError, match="partial_images must be"):
            engine.submit({"num_inference_steps": 2}, partial_images=17)
