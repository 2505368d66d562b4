"""The embedded model's own transparency, with fixed seeds: what is drawn is cut out, white parts stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diffusion_accel import EncoderReuse, LatentTransparency, Reuse, accelerate
from diffusion_accel.evaluation.cutouts import thresholded
from diffusion_accel.measure.fidelity import as_tensor, psnr
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.pipelines.schedulers import set_scheduler

PROMPTS = ["panda, 3d style", "ghost, noto style", "red apple, flat style", "rocket, twemoji style"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = load_pipeline("sticker")
    set_scheduler(pipe, "dpm++")
    pipe.set_progress_bar_config(disable=True)
    return accelerate(pipe)


def draw(pipe: Any, *features: Any) -> list[Any]:
    pipe.acceleration.remove()
    accelerate(pipe, *features)
    generators = [torch.Generator().manual_seed(k) for k in range(len(PROMPTS))]
    call = {"num_inference_steps": 20, "guidance_scale": 3.0, "height": 96, "width": 96}
    return pipe(PROMPTS, generator=generators, **call).images


def test_what_is_drawn_is_opaque_and_what_is_not_is_not(pipe: Any) -> None:
    alphas = [np.asarray(image)[..., 3] / 255 for image in draw(pipe, LatentTransparency())]
    plain = [np.asarray(image) for image in draw(pipe)]
    for alpha in alphas[:3]:
        assert alpha[40:56, 40:56].min() > 0.9, "the middle of a panda, a ghost and an apple"
        assert max(alpha[0, 0], alpha[0, -1]) < 0.05, "upper corners"
        assert 0.2 < alpha.mean() < 0.95
        assert ((alpha < 0.1) | (alpha > 0.9)).mean() > 0.8, "edges are narrow"
    white = [thresholded(rgb)[30:66, 30:66].mean() for rgb in plain[:2]]
    kept = [alpha[30:66, 30:66].mean() for alpha in alphas[:2]]
    assert all(k > 0.99 > w + 0.05 for k, w in zip(kept, white, strict=True)), "white faces"


ACCELERATIONS = [EncoderReuse(schedule="uniform:2"), Reuse(plan="tuned:quality"), Reuse(plan="tuned:balanced")]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("feature", ACCELERATIONS)
def test_acceleration_keeps_alpha(pipe: Any, feature: Any) -> None:
    reference = as_tensor(draw(pipe, LatentTransparency(views=1)))
    made = as_tensor(draw(pipe, LatentTransparency(views=1), feature))
    assert psnr(reference[:, 3:], made[:, 3:]).median() > (25 if isinstance(feature, EncoderReuse) else 35)
