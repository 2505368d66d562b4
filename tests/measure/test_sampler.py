"""The same images again: what a pipeline draws as one tensor, whatever it calls it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zoo

from diffusion_accel import Reuse, UnsupportedPipelineError, accelerate
from diffusion_accel.measure.comparison import compare
from diffusion_accel.measure.sampler import Sampler


def test_the_frames_of_a_video_lie_below_each_other() -> None:
    frames = np.random.default_rng(0).random((2, 3, 4, 5, 3), np.float32)  # videos, frames, height, width, channels
    asked: list[Any] = []

    def draws(**call: Any) -> Any:
        asked.append(call)
        return SimpleNamespace(frames=frames)

    drawn = Sampler(zoo.wan(two=True)[0], ("a", "b"), 3, caller=draws).images()
    assert drawn.shape == (2, 3, 12, 5)
    assert torch.equal(drawn[1, :, 4:8], torch.from_numpy(frames[1, 1]).permute(2, 0, 1))
    assert asked[0]["prompt"] == ["a", "b"] and asked[0]["output_type"] == "np"
    image = Sampler(zoo.sd()[0], ("a", "b"), 3, caller=lambda **_: SimpleNamespace(images=frames[:, 0])).images()
    assert torch.equal(image, torch.from_numpy(frames[:, 0]).permute(0, 3, 1, 2))


def test_a_pipeline_that_needs_an_image_is_refused() -> None:
    pipe, _ = zoo.svd()
    with pytest.raises(UnsupportedPipelineError, match="StableVideoDiffusionPipeline needs image, and here"):
        Sampler(pipe, ("",), 2)
    pipe, call = zoo.inpaint()
    with pytest.raises(UnsupportedPipelineError, match="StableDiffusionInpaintPipeline needs image and mask_image"):
        Sampler(pipe, ("red",), 2, options={"prompt_embeds": call["prompt_embeds"]})
    with pytest.raises(UnsupportedPipelineError, match="needs image and mask_image"):
        compare(accelerate(pipe, Reuse(plan="hold:2")), ["red"], steps=2)
    assert Sampler(pipe, ("red",), 2, options=call).steps == 2
