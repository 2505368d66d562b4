"""The caches that diffusers itself has for transformers, each as its authors recommend it.

They are put on any transformer that takes them, also where a model has no switch for it, and each branch of guidance
has a cache of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import hooks
from diffusers.hooks import HookRegistry, mag_cache
from torch import nn

from diffusion_accel.changes import Changes
from diffusion_accel.denoisers import called_denoisers, find_denoisers, not_a_unet, unlike_halves
from diffusion_accel.diffusers_compat import cacheable_blocks, registry_of
from diffusion_accel.errors import ConfigurationError, UnsupportedPipelineError
from diffusion_accel.hooks import HookSet
from diffusion_accel.reuse.cache_branches import BranchHook
from diffusion_accel.reuse.needs import unfollowable
from diffusion_accel.steps import StepClock

from .peers import Call, Settings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .runner import Runner

# parts of a block as TaylorSeer's authors cache them: what attention and feed-forward return; Flux's single blocks have
# one projection behind both
_BLOCK = r"[a-z_]*(?:blocks|layers)\.[0-9]+\."
_CACHED = [_BLOCK + r"(?:attn[0-9]?|attention|ff|ff_context|ffn|feed_forward|mlp)", r"single_" + _BLOCK + r"proj_out"]
_BEHIND = [r"single_" + _BLOCK + r"(?:attn|proj_mlp)"]
CALIBRATION_SEED = 1000  # how far the image that MagCache measures is from those that are compared


def unfit(kind: str, pipe: DiffusionPipeline) -> str | None:
    """Why one of diffusers' caches cannot be put on a pipeline's denoisers; None if it can."""
    if reason := unfollowable(pipe):
        return reason
    for denoiser in find_denoisers(pipe):
        name = type(denoiser).__name__
        if kind == "pab":
            continue  # it takes attention layers wherever they are
        if not_a_unet(denoiser) is None:
            return f"{kind} is for transformers, and {name} is a U-Net"
        if kind in ("first-block", "mag", "sea") and not cacheable_blocks(denoiser):
            return f"diffusers does not know the blocks of {name}"
    if kind == "faster-cache" and (reason := unlike_halves(pipe)):
        return f"FasterCache takes its batch for an unconditional and a conditional half, but {reason}"
    return None


class CachedCall:
    """A pipeline whose denoisers have a cache: each call begins with an empty one."""

    def __init__(self, runner: Runner, put_on: Callable[[nn.Module, CachedCall], None]) -> None:
        self.pipe: Any = runner.pipe
        self.denoisers = called_denoisers(self.pipe)
        self.clock = StepClock(self.pipe)
        for denoiser in self.denoisers:
            put_on(denoiser, self)
            if not any(registry.hooks for part in denoiser.modules() if (registry := registry_of(part)) is not None):
                raise ConfigurationError(f"it finds no layers in {type(denoiser).__name__} that it could leave out")
            HookRegistry.check_if_exists_or_initialize(denoiser).invalidate_child_registries_cache()

    def timestep(self) -> float:
        """The scheduler's timestep of the present step."""
        return self.clock.timesteps[self.clock.index]

    def __call__(self, **arguments: Any) -> Any:
        """Call the pipeline."""
        with Changes() as changes:
            self.clock = StepClock(self.pipe, arguments)
            branches = HookSet.within(changes, "diffusion_accel.bench")
            changes.add(self.clock.stop)
            for denoiser in self.denoisers:
                HookRegistry.check_if_exists_or_initialize(denoiser).reset_stateful_hooks()
                branches.add(denoiser, BranchHook(self.clock))
            self.clock.start(self.denoisers)
            return self.pipe(**arguments)


def pab(settings: Settings, runner: Runner) -> Call:
    """Pyramid Attention Broadcast (Zhao et al. 2024, arXiv 2408.12588)."""
    every = settings["range"]

    def put_on(denoiser: nn.Module, call: CachedCall) -> None:
        config = hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=every, current_timestep_callback=call.timestep
        )
        if not_a_unet(denoiser) is None:
            config.cross_attention_block_skip_range = every
            config.spatial_attention_block_identifiers = config.cross_attention_block_identifiers = ("attentions",)
        hooks.apply_pyramid_attention_broadcast(denoiser, config)

    return CachedCall(runner, put_on)


def first_block(settings: Settings, runner: Runner) -> Call:
    """FirstBlockCache (Cheng, ParaAttention)."""
    config = hooks.FirstBlockCacheConfig(threshold=settings["threshold"])
    return CachedCall(runner, lambda denoiser, _: hooks.apply_first_block_cache(denoiser, config))


def taylorseer(settings: Settings, runner: Runner) -> Call:
    """TaylorSeer (Liu et al., ICCV 2025, arXiv 2503.06923).

    `parts`: "blocks": what attention and feed-forward of each block return, as published; "attention": diffusers'
    default; "lite": what the last layer returns, and no block is computed.
    """
    parts = settings["parts"]

    def put_on(denoiser: nn.Module, _: CachedCall) -> None:
        if parts == "lite" and not hasattr(denoiser, "proj_out"):
            raise ConfigurationError(
                f"parts=lite forecasts a layer called proj_out, and {type(denoiser).__name__} has none"
            )
        config = hooks.TaylorSeerCacheConfig(
            cache_interval=settings["interval"],
            max_order=settings["order"],
            disable_cache_before_step=settings["warmup"],
            taylor_factors_dtype=next(denoiser.parameters()).dtype,
            use_lite_mode=parts == "lite",
        )
        if parts == "blocks":
            config.cache_identifiers, config.skip_predict_identifiers = _CACHED, _BEHIND
        hooks.apply_taylorseer_cache(denoiser, config)

    return CachedCall(runner, put_on)


def mag(settings: Settings, runner: Runner) -> Call:
    """MagCache (Ma et al. 2025, arXiv 2506.09045), with the ratios of this model, measured on one more image."""
    if runner.pipe.scheduler.order > 1:
        raise ConfigurationError(f"MagCache counts steps, and {type(runner.pipe.scheduler).__name__} repeats timesteps")

    def config(**more: Any) -> Any:
        return hooks.MagCacheConfig(num_inference_steps=runner.job.steps, **more)

    measured = CachedCall(runner, lambda denoiser, _: hooks.apply_mag_cache(denoiser, config(calibrate=True)))
    sampler = replace(runner.sampler.part(0, 1), caller=measured)
    with contextlib.redirect_stdout(io.StringIO()) as said, torch.inference_mode():
        replace(sampler, seed=sampler.seed + CALIBRATION_SEED).images()
    ratios = json.loads(re.findall(r"^\[[0-9].*\]$", said.getvalue(), re.MULTILINE)[0])  # of the conditional branch
    own = config(
        mag_ratios=ratios,
        threshold=settings["threshold"],
        max_skip_steps=settings["skips"],
        retention_ratio=settings["retention"],
    )
    return CachedCall(runner, lambda denoiser, _: mag_cache.apply_mag_cache(denoiser, own))


def sea(settings: Settings, runner: Runner) -> Call:
    """SeaCache (2026, arXiv 2602.18993); images are videos of one frame."""
    config = hooks.SeaCacheConfig(
        threshold=settings["threshold"],
        residual_order=settings["order"],
        max_consecutive_cached=settings["skips"],
        raw_vision_callback=latents_of,
    )
    return CachedCall(runner, lambda denoiser, _: hooks.apply_sea_cache(denoiser, config))


def latents_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What a transformer is given as images, one (C, frames, H, W) for each row of the batch.

    Raises:
        UnsupportedPipelineError: it is given tokens, and not where they are. (SeaCache would take a `ValueError` as a
            reason to compute every step.)
    """
    latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    places = kwargs.get("img_ids")
    if latents.dim() == 3 and places is not None:  # Flux: (B, H · W, C)
        height = int(places[..., 1].max()) + 1
        latents = latents.unflatten(1, (height, -1)).movedim(-1, 1)
    if latents.dim() not in (4, 5):
        raise UnsupportedPipelineError(f"SeaCache looks at images, and {type(module).__name__} is given tokens")
    return [row.unsqueeze(1) if row.dim() == 3 else row for row in latents]


def faster_cache(settings: Settings, runner: Runner) -> Call:
    """FasterCache (Lv et al. 2024, arXiv 2410.19355)."""
    halves = layout_of(runner).rows > 1

    def put_on(denoiser: nn.Module, call: CachedCall) -> None:
        config = hooks.FasterCacheConfig(
            spatial_attention_block_skip_range=settings["range"],
            unconditional_batch_skip_range=settings["unconditional"],
            is_guidance_distilled=not halves,  # else two images would be taken for the two branches
            tensor_format="BCHW",
            current_timestep_callback=call.timestep,
        )
        hooks.apply_faster_cache(denoiser, config)

    return CachedCall(runner, put_on)


@dataclass(frozen=True)
class Layout:
    """How a pipeline computes one image: how often it calls its denoisers a step, and with how many rows each time."""

    calls: int
    rows: int


def layout_of(runner: Runner) -> Layout:
    """How a pipeline computes one image; it draws one to know that."""
    rows: list[int] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = next(v for v in (kwargs.get("hidden_states"), kwargs.get("sample"), *args) if v is not None)
        rows.append(len(latents))

    clock = StepClock(runner.pipe)
    with Changes() as changes, torch.inference_mode():
        for denoiser in called_denoisers(runner.pipe):
            handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
            changes.add(handle.remove)
        changes.add(clock.stop)
        clock.start(called_denoisers(runner.pipe))
        runner.sampler.part(0, 1).images()
    return Layout(max(1, len(rows) // max(1, clock.steps)), max(rows))
