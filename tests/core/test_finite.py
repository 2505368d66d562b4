"""Numbers that are none: said or refused, never a black image without a word."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from model_folder import draw, write_folder

from diffusion_accel import ConfigurationError, accelerate
from diffusion_accel.errors import CallStateError
from diffusion_accel.pipelines.loading import load_pipeline


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model") / "whole")


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # diffusers turns it to bytes
def test_no_image_that_is_not_a_number_comes_out_silently(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = accelerate(load_pipeline(str(whole)))
    with caplog.at_level(logging.WARNING, "diffusion_accel"):
        draw(pipe)
        assert not caplog.records
        with pytest.raises(ConfigurationError, match="latents"):
            draw(pipe, latents=torch.full((1, 4, 8, 8), torch.nan))
        pipe.scheduler.alphas_cumprod[:] = torch.nan  # the first prediction is still whole
        for kind in ("pil", "latent"):
            draw(pipe, output_type=kind)
            assert "not finite" in caplog.text
            caplog.clear()
        with torch.no_grad():
            pipe.unet.conv_in.bias[0] = torch.nan
        with pytest.raises(CallStateError, match="first prediction"):
            draw(pipe)
    assert not pipe.unet._forward_hooks and not pipe.vae.decoder._forward_hooks


def test_arguments_of_a_call_are_finite(whole: Path) -> None:
    pipe = accelerate(load_pipeline(str(whole)))
    broken = np.full((1, 8, 8, 3), np.nan, np.float32)
    for name, value in {
        "guidance_scale": float("nan"),
        "guidance_rescale": float("inf"),
        "prompt_embeds": torch.full((1, 8, 16), torch.nan),
        "ip_adapter_image_embeds": [torch.full((2, 1, 4), torch.nan)],
        "ip_adapter_image": broken,
        "sigmas": [1.0, float("nan")],
    }.items():
        with pytest.raises(ConfigurationError, match=f"^{name} holds numbers that are not finite"):
            draw(pipe, **{name: value})
