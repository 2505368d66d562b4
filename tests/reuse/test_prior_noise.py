"""Prior noise injection against its own reference."""

from __future__ import annotations

from typing import Any

import encoder_oracle as oracle
import pytest
import reuse_tools
import torch
from reuse_tools import close
from zoo import ZOO, ddim, rand, run, sd, sdxl

from diffusion_accel import AccelerationError, EncoderReuse, accelerate


def counters(pipe: Any) -> dict[str, float]:
    return reuse_tools.counters(pipe, "encoder_reuse")


@pytest.mark.parametrize("batched", [False, True], ids=["sequential", "batched"])
def test_prior_noise_against_its_own_reference(batched: bool) -> None:
    pipe, call = sd()
    latents = rand(1, 4, 8, 8, seed=9)
    embeds = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])

    def ours(alpha: float, keys: tuple[int, ...] = (0, 3)) -> torch.Tensor:
        accelerate(pipe, EncoderReuse(schedule=keys, batch_decoder=batched, prior_noise=alpha))
        return run(pipe, {**call, "height": 16, "width": 16}, steps=8, latents=latents.clone())

    def theirs(alpha: float, before: bool) -> torch.Tensor:
        args = (pipe.unet, ddim(), latents, embeds, 5.0, 8, {0, 3})
        return oracle.sample(*args, alpha=alpha, noise_before_unet=before)

    assert close(ours(0.05), theirs(0.05, before=not batched))
    assert counters(pipe)["noise_injections"] == 4  # timesteps 501 … 1 of 8 leading steps: the last four below 500
    assert torch.equal(ours(0.0), ours(0.0)) and close(ours(0.0), theirs(0.0, True))
    assert not close(ours(0.05), ours(0.0), tolerance=1e-3)


def test_prior_noise_timings_differ_only_at_key_steps() -> None:
    """With no key step below tau the two timings are the same; with one they differ by design."""
    pipe, call = sd()
    results = {}
    above, below = (0, 3), (0, 4, 5, 6, 7)
    for keys in (above, below):
        for batched in (False, True):
            accelerate(pipe, EncoderReuse(schedule=keys, batch_decoder=batched, prior_noise=0.1))
            results[keys, batched] = run(pipe, call, steps=8)
    rounding = (results[above, False] - results[above, True]).abs().max()
    assert close(results[above, False], results[above, True])
    assert (results[below, False] - results[below, True]).abs().max() > 10 * rounding


def test_prior_noise_is_refused_where_latents_are_scaled_by_sigma() -> None:
    pipe, call = sdxl()
    base = run(pipe, call)
    with pytest.raises(AccelerationError, match="EulerDiscreteScheduler"):
        accelerate(pipe, EncoderReuse(prior_noise=0.003))
    assert torch.equal(run(pipe, call), base)


def test_prior_noise_at_the_first_step_of_an_image() -> None:
    """An image with a low strength begins below tau: noise is added before the U-Net sees the first latents, too."""
    pipe, call = ZOO["img2img"]()
    alpha, firsts = 0.05, []
    accelerate(pipe, EncoderReuse(schedule="all", batch_decoder=False, prior_noise=alpha))
    got = run(pipe, call, steps=8, strength=0.4)
    assert counters(pipe)["noise_injections"] == pipe.acceleration.report().steps == 3
    pipe.acceleration.remove()
    prepare = pipe.prepare_latents

    def noisier(*args: Any, **kwargs: Any) -> torch.Tensor:
        firsts.append(prepare(*args, **kwargs))
        return firsts[0] + alpha * firsts[0]

    def inject(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] + alpha * firsts[0] if i < 2 else values["latents"]}

    pipe.prepare_latents = noisier
    assert close(got, run(pipe, call, steps=8, strength=0.4, callback_on_step_end=inject))
