"""The caches that diffusers itself has for transformers, driven by the same switch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from zoo import Built, flux, flux_guided, rand, run, sd, seeded

from diffusion_accel import AccelerationError, ConfigurationError, Reuse, accelerate
from diffusion_accel.reuse.diffusers_cache import DiffusersCache
from diffusion_accel.reuse.diffusers_cache_run import cache_config


def counters(pipe: Any) -> dict[str, float]:
    return pipe.acceleration.report().counters["reuse"]


def reused(pipe: Any, call: dict[str, Any], plan: str) -> torch.Tensor:
    accelerate(pipe, Reuse(plan=plan))
    return run(pipe, call)


def cogvideox() -> Built:
    """A video transformer with both branches of guidance in a batch, which FasterCache needs."""
    transformer = seeded(
        lambda: CogVideoXTransformer3DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
            text_embed_dim=16, num_layers=2, sample_width=4, sample_height=4, sample_frames=9, patch_size=2,
            temporal_compression_ratio=4, max_text_seq_length=6,
        )
    )  # fmt: skip
    vae = seeded(
        lambda: AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        )
    )  # fmt: skip
    pipe = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=CogVideoXDDIMScheduler()
    )
    embeds = {"prompt_embeds": rand(1, 6, 16, seed=1), "negative_prompt_embeds": rand(1, 6, 16, seed=2)}
    size = {"height": 32, "width": 32, "num_frames": 9}
    return pipe, {**embeds, **size, "guidance_scale": 4.0, "output_type": "latent"}


@pytest.mark.parametrize(
    ("build", "name"),
    [(flux, name) for name in ("first-block:0.5", "taylorseer:3,1", "mag:0.5", "pab:2")]
    + [(flux_guided, "first-block:0.5")]
    + [(cogvideox, name) for name in ("faster-cache:2,3", "pab:2")],
)
def test_diffusers_caches_equal_enable_cache_and_leave_no_trace(build: Any, name: str) -> None:
    pipe, call = build()

    def left() -> list[tuple[str, str]]:
        modules = pipe.transformer.named_modules()
        return [
            (path, key) for path, module in modules for key in ("_diffusers_hook", "forward") if key in vars(module)
        ]

    plain = run(pipe, call, steps=8)
    before = left()  # the pipeline itself gives its transformer a registry, for the cache's context
    accelerate(pipe, Reuse(plan=name))
    got = run(pipe, call, steps=8)
    counted = counters(pipe)
    assert torch.equal(run(pipe, call, steps=8), got), "the second call begins with an empty cache"
    assert left() == before and "set_timesteps" not in vars(pipe.scheduler)
    pipe.acceleration.remove()
    assert torch.equal(run(pipe, call, steps=8), plain)
    pipe.transformer.enable_cache(cache_config(DiffusersCache.parse(name), 8, pipe, call))
    assert torch.equal(run(pipe, call, steps=8), got)
    if name != "taylorseer:3,1":
        blocks = 2 if build is cogvideox else 4
        assert min(n for n in counted.values() if n) < 8 * blocks, "something was skipped"
    with pytest.raises(AccelerationError, match="enabled on its transformer already"):
        accelerate(pipe, Reuse(plan=name))


def test_faster_cache_knows_branches_from_images() -> None:
    """Two images of a pipeline without branches are no unconditional and conditional half: each is as by itself."""
    pipe, call = flux()
    two = {k: torch.cat([v, rand(*v.shape, seed=7)]) for k, v in call.items() if k.endswith("embeds")}
    latents = rand(2, 16, 16, seed=9)
    accelerate(pipe, Reuse(plan="faster-cache:2,2"))
    both = pipe(**{**call, **two}, latents=latents, num_inference_steps=6).images
    for i in range(2):
        one = {k: v[i : i + 1] for k, v in two.items()}
        alone = pipe(**{**call, **one}, latents=latents[i : i + 1], num_inference_steps=6).images
        assert torch.allclose(both[i : i + 1], alone, atol=1e-4)


@pytest.mark.parametrize("plan", ["pab:2", "faster-cache:2,2", "first-block:0.5", "taylorseer:3,1"])
def test_branches_that_are_calls_of_their_own_have_caches_of_their_own(plan: str) -> None:
    """Where both branches are told the same, guidance changes nothing: as without it, whatever else is kept."""
    pipe, call = flux()
    same = {f"negative_{k}": v for k, v in call.items() if k.endswith("embeds")}
    alone = reused(pipe, call, plan)
    assert not torch.equal(alone, reused(pipe, call, "full"))
    torch.testing.assert_close(reused(pipe, {**call, **same, "true_cfg_scale": 3.0}, plan), alone)


def test_transformers_with_caches_take_our_plans_too() -> None:
    pipe, call = flux()
    plain = run(pipe, call)
    assert torch.equal(reused(pipe, call, "full"), plain)
    for plan in ("hold:2", "shallow:2,2@1", "shallow:2,1@0"):
        assert not torch.equal(reused(pipe, call, plan), plain)
        assert counters(pipe)["full_steps"] == 3
    for options, words in (({"plan": "first-block:0"}, "first-block:threshold"), ({"plan": "pab:1.5"}, "pab:range")):
        with pytest.raises(ConfigurationError, match=words):
            accelerate(pipe, Reuse(**options))
    with pytest.raises(AccelerationError, match="none of diffusers' caches"):
        accelerate(sd()[0], Reuse(plan="first-block"))


def test_taylorseer_is_refused_where_diffusers_would_put_it_on_nothing() -> None:
    """It finds attention layers by whole names, and Wan's are called attn1 and attn2: no step would be left out."""
    wan = seeded(
        lambda: WanTransformer3DModel(
            patch_size=(1, 2, 2), in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2,
            rope_max_seq_len=32, num_attention_heads=2, attention_head_dim=12,
        )
    )  # fmt: skip
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=wan, scheduler=FlowMatchEulerDiscreteScheduler()
    )
    with pytest.raises(AccelerationError, match="TaylorSeer of diffusers finds no attention in WanTransformer3DModel"):
        accelerate(pipe, Reuse(plan="taylorseer:3"))
    assert Reuse(plan="first-block").supports(pipe) is None and Reuse(plan="hold:2").supports(pipe) is None
