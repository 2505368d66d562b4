"""A quantized model beside the features of this package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import zoo
from diffusers import DiffusionPipeline
from quantized import TINY, Prompted, draw

from diffusion_accel import accelerate
from diffusion_accel.quant.model import RUNTIMES, runtime_report, set_runtime
from diffusion_accel.quant.ptq.run import quantize_denoiser
from diffusion_accel.reuse import Reuse


def test_reuse_works_on_a_quantized_model(checkpoint: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(checkpoint)
    set_runtime(pipe, "integer")
    plain = draw(pipe)
    accelerate(pipe, Reuse(plan="full"))
    assert torch.equal(draw(pipe), plain)
    accelerate(pipe, Reuse(plan="deepcache:2"))
    assert not torch.equal(draw(pipe), plain)
    pipe.acceleration.remove()
    assert torch.equal(draw(pipe), plain)
    assert set(runtime_report(pipe.unet).values()) == {"integer"}


def test_encoder_reuse_with_batched_steps_uses_the_grids_of_each_step(tmp_path: Path) -> None:
    pipe, call = zoo.sd()
    # 16 bits: with fewer, what is equal but for float rounding lands on other levels
    quantize_denoiser(Prompted(pipe, call), replace(TINY, activation_bits=16, attention_bits=16), tmp_path / "work")
    set_runtime(pipe, "simulated")
    from diffusion_accel import EncoderReuse

    images = []
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule="uniform:3", batch_decoder=batched))
        images.append(zoo.run(pipe, call))
    assert (images[0] - images[1]).norm() < 1e-3 * images[0].norm()


def test_every_runtime_counts_the_same_work(checkpoint: Path) -> None:
    from diffusion_accel.flops import count_flops

    model = DiffusionPipeline.from_pretrained(checkpoint).unet
    x = torch.randn(2, 3, 8, 8)
    counts = {}
    for runtime in RUNTIMES:  # auto first: what it tries out is not counted
        set_runtime(model, runtime)
        with torch.no_grad(), count_flops() as count:
            model(x, 10)
        counts[runtime] = count.total
    assert len(set(counts.values())) == 1 and counts["integer"] > 1e5
