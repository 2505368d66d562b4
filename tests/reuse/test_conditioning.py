"""ControlNets, adapters and FreeU under encoder reuse."""

from __future__ import annotations

import contextlib
from typing import Any

import encoder_oracle as oracle
import pytest
import reuse_tools
import torch
from reuse_tools import close, counting
from zoo import ZOO, ddim, rand, run, sd

from diffusion_accel import EncoderReuse, accelerate


def counters(pipe: Any) -> dict[str, float]:
    return reuse_tools.counters(pipe, "encoder_reuse")


@pytest.mark.parametrize("kind", ["controlnet", "controlnets", "controlnet_guess_mode"])
def test_controlnets_run_at_key_steps_only(kind: str) -> None:
    pipe, call = ZOO[kind]()
    accelerate(pipe, EncoderReuse(schedule=(0, 2, 5)))
    nets = pipe.controlnet.nets if hasattr(pipe.controlnet, "nets") else [pipe.controlnet]
    with contextlib.ExitStack() as stack:
        hooks = [stack.enter_context(counting(net.controlnet_cond_embedding)) for net in nets]
        run(pipe, call, steps=8)
    assert [h.calls for h in hooks] == [3] * len(nets)
    assert counters(pipe)["controlnet_runs"] == 3 and counters(pipe)["controlnet_skipped"] == 5


@pytest.mark.parametrize("kind", ["controlnet", "t2i_adapter", "ip_adapter"])
def test_conditioning_still_acts(kind: str) -> None:
    pipe, call = ZOO[kind]()
    accelerate(pipe, EncoderReuse(schedule="uniform:3"))
    first = run(pipe, call)
    key = "ip_adapter_image_embeds" if kind == "ip_adapter" else "image"
    other = [-t for t in call[key]] if isinstance(call[key], list) else -call[key]
    assert not torch.equal(run(pipe, {**call, key: other}), first)


def test_t2i_residuals_enter_the_cached_features_once() -> None:
    """diffusers adds adapter features in place; reused features must not collect them again at every step."""
    pipe, call = ZOO["t2i_adapter"]()
    accelerate(pipe, EncoderReuse(schedule=(0,), batch_decoder=False))
    sequential = run(pipe, call, steps=9)
    accelerate(pipe, EncoderReuse(schedule=(0,), batch_decoder=True))
    assert close(run(pipe, call, steps=9), sequential)
    assert sequential.isfinite().all()


def test_freeu_scales_reused_features_once() -> None:
    pipe, call = sd()
    pipe.unet.up_blocks[0].resolution_idx, pipe.unet.up_blocks[1].resolution_idx = 0, 1
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    base = run(pipe, call)
    accelerate(pipe, EncoderReuse.neutral())
    assert torch.equal(run(pipe, call), base)
    results = []
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule=(0, 1), batch_decoder=batched))
        results.append(run(pipe, call))
    assert close(*results)
    keep = {"schedule": (0, 1), "batch_decoder": False}
    embeds = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    latents = rand(1, 4, 8, 8, seed=9)
    accelerate(pipe, EncoderReuse(**keep))
    got = run(pipe, call, steps=4, latents=latents.clone())

    def decode_copies(unet: Any, h: torch.Tensor, *rest: Any) -> torch.Tensor:
        return original(unet, h.clone(), *rest)

    original, oracle.decode = oracle.decode, decode_copies
    try:
        want = oracle.sample(pipe.unet, ddim(), latents, embeds, 5.0, 4, {0, 1})
    finally:
        oracle.decode = original
    assert close(got, want)
