"""What a call needs before its first step: checks, hooks on its models, and agreement among the processes."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import nn

from diffusion_accel.changes import Changes
from diffusion_accel.denoisers import (
    RESIDUAL_ARGUMENTS,
    entry_layer,
    find_controlnet,
    find_denoiser,
    find_denoisers,
    not_splittable,
    rows_are_independent,
    uses_freeu,
)
from diffusion_accel.diffusers_compat import guidance_scale_of, is_offloaded
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.hooks import HookSet, model_of, tensors_in
from diffusion_accel.steps import StepClock

from .context import SharedHook, share, transformers_of, unshare, why_not_shared
from .group import World, agree
from .model_hooks import DenoiserHook, install_controlnet, install_layers, install_vae
from .run import PatchRun


def why_not(pipeline: Any, cfg_parallel: bool, ranks: int) -> str | None:
    """Why this pipeline, as it is now, cannot be called on several processes; None if it can."""
    denoiser: Any = find_denoiser(pipeline)
    shared = transformers_of(pipeline)
    autoencoder = model_of(pipeline.vae) if getattr(pipeline, "vae", None) is not None else None
    models = shared or [denoiser]
    if any(is_offloaded(m) for d in models for m in d.modules() if m is not d):
        return "its layers are offloaded one by one (sequential offload); use model offload instead"
    if shared and cfg_parallel:
        return "cfg_parallel splits the batch of a U-Net; leave it out for a transformer"
    if shared:
        return next(filter(None, (why_not_shared(model, ranks) for model in shared)), None)
    if uses_freeu(denoiser):
        return "FreeU filters whole feature maps; call disable_freeu() first"
    parts = [m for model in (denoiser, autoencoder) if isinstance(model, nn.Module) for m in model.modules()]
    if any(getattr(m, "fused_projections", False) for m in parts):
        return "query, key and value projections are fused; call unfuse_qkv_projections() first"
    if cfg_parallel and ranks % 2:
        return f"cfg_parallel needs an even number of processes, this job has {ranks}"
    if cfg_parallel and not rows_are_independent(denoiser):
        return "cfg_parallel splits the batch, but an attention processor looks at other rows of it"
    return None


def install(changes: Changes, run: PatchRun, pipeline: Any, cfg_parallel: bool, vae: bool, check: Any) -> None:
    """Put all hooks of a call on the models of a pipeline."""
    shared = transformers_of(pipeline)
    for model in shared:
        changes.add(partial(unshare, model))
        share(model, run.world)
    hooks = HookSet.within(changes, "diffusion_accel.patch_parallel")  # behind diffusers' own: removed before those
    if shared:
        for model in shared:
            hooks.add(model, SharedHook(check, run.count_step))
    else:
        denoiser: Any = find_denoiser(pipeline)
        install_layers(hooks, run, denoiser, "denoiser", entry_layer(denoiser))
        hooks.add(denoiser, DenoiserHook(run, cfg_parallel, check))
    controlnet: Any = model_of(net) if (net := find_controlnet(pipeline)) is not None else None
    if controlnet is not None and not cfg_parallel:
        nets = [model_of(net) for net in controlnet.nets] if hasattr(controlnet, "nets") else [controlnet]
        if all(not_splittable(net) is None and not net.config.global_pool_conditions for net in nets):
            for number, net in enumerate(nets):
                install_controlnet(hooks, run, net, f"controlnet.{number}", check)
    autoencoder = model_of(pipeline.vae) if getattr(pipeline, "vae", None) is not None else None
    if vae and autoencoder is not None and not_splittable(autoencoder) is None:
        install_vae(hooks, run, autoencoder, check)


class Agreement:
    """Compares what the processes were asked for when a model is first called, before anything else is exchanged.

    The denoiser's latents are compared at its second pass as well: noise that a scheduler drew at the first step from
    generators that differ.
    """

    def __init__(self, pipeline: Any, clock: StepClock, world: World) -> None:
        self.pipeline, self.clock, self.world = pipeline, clock, world
        self._passes: Counter[str] = Counter()

    def __call__(self, named: dict[str, Any], name: str = "denoiser") -> None:
        """Compare the arguments of a call of the model `name`."""
        self._passes[name] += 1
        first = self._passes[name] == 1
        if name != "denoiser":
            if first:
                conditions = {k: v for k, v in named.items() if k != "timestep"}
                agree(self.world, {f"what goes into the {name}": conditions}, tensors_in(named)[0].device)
            return
        attention = named.get("cross_attention_kwargs") or {}
        for key in ("ip_adapter_masks", "gligen"):
            if attention.get(key) is not None:
                raise ConfigurationError(f"patch_parallel does not support {key}: it refers to the whole image")
        if first:
            agree(self.world, self._asked(named), latents_of(named).device)
        elif self._passes[name] == 2:
            agree(self.world, {"the latents after one step": latents_of(named)}, latents_of(named).device)

    def _asked(self, named: dict[str, Any]) -> dict[str, Any]:
        handle = self.pipeline.acceleration
        models: list[Any] = find_denoisers(self.pipeline)
        scheduler = self.pipeline.scheduler
        apart = {"sample", "hidden_states", "timestep", "encoder_hidden_states", "return_dict"}
        if any(name.startswith("controlnet") for name in self._passes):  # its own arguments were compared
            apart |= set(RESIDUAL_ARGUMENTS)
        return {
            "the size or number of images": [*latents_of(named).shape],
            "the number of steps": len(self.clock.timesteps),
            "the timesteps": self.clock.timesteps,
            "the scheduler": [type(scheduler).__name__, _settings(scheduler)],
            "the model": [[type(model).__name__, _settings(model), sampled_weights(model)] for model in models],
            "the way quantized layers compute": [getattr(model, "low_bit_runtime", None) for model in models],
            "the guidance scale": guidance_scale_of(self.pipeline),
            "the features": {name: f.to_dict() for name, f in handle.features.items() if handle.enabled(name)},
            "the prompt": named.get("encoder_hidden_states"),
            "the conditions": {k: v for k, v in named.items() if k not in apart},
            "the latents": latents_of(named),
        }


def latents_of(named: dict[str, Any]) -> Any:
    """The latents among the arguments of a U-Net or a transformer."""
    return named["sample"] if "sample" in named else named["hidden_states"]


@torch.no_grad()
def sampled_weights(model: nn.Module) -> list[Any]:
    """One number of every parameter, with the strength of every adapter: tells fine-tuned models and LoRAs apart.

    Parameters that another package has packed are left out: they have no single numbers.
    """
    plain = [p for p in model.parameters() if type(p) is nn.Parameter and p.numel()]
    found = [p[tuple(extent // 2 for extent in p.shape)].double() for p in plain]
    adapters = [sorted(m.scaling.items()) for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    return [torch.stack(found) if found else None, adapters]


def _settings(component: Any) -> dict[str, Any]:
    """The configuration of a model or scheduler, without what diffusers notes beside it in no particular order."""
    return {k: v for k, v in getattr(component, "config", {}).items() if not k.startswith("_")}
