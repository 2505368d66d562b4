"""What a call needs before its first step: checks, and hooks on its models."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from diffusion_accel.changes import Changes
from diffusion_accel.denoisers import (
    denoiser_names,
    entry_layer,
    family_of,
    find_controlnet,
    find_denoiser,
    not_splittable,
    rows_are_independent,
    token_layers,
    uses_freeu,
)
from diffusion_accel.diffusers_compat import context_parallel_plan, is_offloaded, other_backend, parallel_config
from diffusion_accel.hooks import HookSet, model_of

from .context import SharedHook, share, transformers_of, unshare, why_not_shared
from .model_hooks import DenoiserHook, install_controlnet, install_layers, install_vae
from .run import PatchRun
from .token_hooks import install_tokens


def by_diffusers(pipeline: Any, cfg_parallel: bool, mode: str, ranks: int) -> bool:
    """Whether diffusers shares the transformers of a pipeline among so many processes, not hooks of our own."""
    if cfg_parallel or mode != "sync" or find_controlnet(pipeline) is not None:
        return False
    return not any(why_not_shared(model, ranks) for model in transformers_of(pipeline))


def why_not_transformers(pipeline: Any, cfg_parallel: bool, mode: str, ranks: int = 2) -> str | None:
    """Why neither diffusers nor hooks of our own can share the transformers of a pipeline, as they are now; None if one
    can."""
    if by_diffusers(pipeline, cfg_parallel, mode, ranks):
        return None
    for model in transformers_of(pipeline):
        name = type(model).__name__
        try:
            tokens = token_layers(model).tokens
        except ValueError as error:
            if context_parallel_plan(type(model)) is None:
                return str(error)
            return why_not_shared(model, ranks) or f"{error}; diffusers shares it with mode=sync and nothing else"
        if mode == "partial":
            return f"mode=partial is for U-Nets, and {name} is a transformer; use mode=displaced"
        if (backend := other_backend(model)) is not None:
            return f"attention backend {backend} of {name} cannot be shared; call set_attention_backend('native')"
        if find_controlnet(pipeline) is not None and not tokens.controls:
            return f"{name} cannot be shared with a ControlNet"
    return family_of(pipeline).whole


def why_not(pipeline: Any, cfg_parallel: bool, mode: str, ranks: int) -> str | None:
    """Why this pipeline, as it is now, cannot be called on several processes; None if it can."""
    denoiser: Any = find_denoiser(pipeline)
    shared = transformers_of(pipeline)
    autoencoder = model_of(pipeline.vae) if getattr(pipeline, "vae", None) is not None else None
    models = shared or [denoiser]
    if any(is_offloaded(m) for d in models for m in d.modules() if m is not d):
        return "its layers are offloaded one by one (sequential offload); use model offload instead"
    if cfg_parallel and ranks % 2:
        return f"cfg_parallel needs an even number of processes, this job has {ranks}"
    for model in shared:
        if parallel_config(model) is not None:
            return f"{type(model).__name__} is parallel already, by enable_parallelism; load it without"
    if shared:
        return why_not_transformers(pipeline, cfg_parallel, mode, ranks)
    if uses_freeu(denoiser):
        return "FreeU filters whole feature maps; call disable_freeu() first"
    parts = [m for model in (denoiser, autoencoder) if isinstance(model, nn.Module) for m in model.modules()]
    if any(getattr(m, "fused_projections", False) for m in parts):
        return "query, key and value projections are fused; call unfuse_qkv_projections() first"
    if cfg_parallel and not rows_are_independent(denoiser):
        return "cfg_parallel splits the batch, but an attention processor looks at other rows of it"
    return None


def install(changes: Changes, run: PatchRun, pipeline: Any, cfg_parallel: bool, vae: bool, check: Any) -> None:
    """Put all hooks of a call on the models of a pipeline."""
    shared, theirs = transformers_of(pipeline), by_diffusers(pipeline, cfg_parallel, run.mode, run.world.size)
    for model in shared if theirs else ():
        changes.add(partial(unshare, model))
        share(model, run.world)
    hooks = HookSet.within(changes, "diffusion_accel.patch_parallel")  # behind diffusers' own: removed before those
    for name, model in zip(denoiser_names(pipeline), shared, strict=False):
        if theirs:
            hooks.add(model, SharedHook(check, run))
        else:
            install_tokens(hooks, run, model, name, cfg_parallel, check)
    if not shared:
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
