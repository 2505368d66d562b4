"""Every kind of denoiser is quantized, saved, restored; what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from diffusers import DiffusionPipeline
from quantized import TINY, Prompted, tiny_pipeline, traces

from diffusion_accel.denoisers import find_denoiser
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.quant.model import set_runtime
from diffusion_accel.quant.ptq.run import quantize_denoiser

KINDS = ("sd", "sdxl", "deepfloyd_if", "controlnet", "ip_adapter", "unet2d_skip", "unet3d", "svd", "dit", "flux")


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_denoiser(kind: str, tmp_path: Path) -> None:
    pipe, call = getattr(zoo, kind)()
    plain, before = zoo.run(pipe, call, 4), traces(find_denoiser(pipe))
    run = quantize_denoiser(Prompted(pipe, call), replace(TINY, weight_bits=8, softmax_bits=8), tmp_path / "work")
    assert len(run.layers()) > 5 and run.validation["quantized"] < 0.2
    set_runtime(pipe, "simulated")
    ours = zoo.run(pipe, call, 4)
    assert torch.isfinite(ours).all() and not torch.equal(ours, plain)
    run.model.save_pretrained(tmp_path / "model")
    run.restore()
    assert torch.equal(zoo.run(pipe, call, 4), plain)
    assert traces(run.denoiser) == before
    part = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    again = type(getattr(pipe, part)).from_pretrained(tmp_path / "model")
    set_runtime(again, "simulated")
    setattr(pipe, part, again)
    if kind != "ip_adapter":  # its own weights are part of no model folder
        assert torch.equal(zoo.run(pipe, call, 4), ours)


def test_a_quantized_model_is_not_quantized_again(checkpoint: Path, tmp_path: Path) -> None:
    from diffusion_accel import UnsupportedPipelineError

    pipe = DiffusionPipeline.from_pretrained(checkpoint)
    with pytest.raises(UnsupportedPipelineError, match="quantized already"):
        quantize_denoiser(Sampler(pipe, ("",) * 4, 4), TINY, tmp_path)
    with pytest.raises(ConfigurationError, match="runtime must be one of"):
        set_runtime(pipe, "fast")
    with pytest.raises(ConfigurationError, match="no quantized layers"):
        set_runtime(tiny_pipeline(), "integer")
