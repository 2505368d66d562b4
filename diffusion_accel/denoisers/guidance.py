"""The branches of guidance: whether one can be left out, and whether a call uses guidance at all."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

from torch import nn

from diffusion_accel.hooks import forward_parameters

from .batch import latents_argument
from .families import DISTILLED, HALVES, family_of
from .find import find_denoiser, find_denoisers
from .layers import mixes_rows
from .timestep import time_argument
from .unet import not_a_unet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def not_followed(pipeline: DiffusionPipeline) -> str | None:
    """Why the steps of a pipeline's denoiser cannot be told apart or left out; None if they can."""
    for denoiser in find_denoisers(pipeline):
        names = forward_parameters(denoiser)
        if time_argument(names) is None or latents_argument(names) is None:
            return f"{type(denoiser).__name__} does not take latents and a timestep as other denoisers do"
    whole = family_of(pipeline).whole
    return None if whole is None else f"no step can be left out: {whole}"


def no_branches(pipeline: DiffusionPipeline) -> str | None:
    """Why no branch of guidance can be left out at some steps; None if one can."""
    family, denoiser = family_of(pipeline), find_denoiser(pipeline)
    if family.reason:
        return f"{family.reason}, so guidance=both is the only choice"
    if _is_distilled(pipeline, denoiser):
        return "its guidance is an input of the distilled model, so guidance=both is the only choice"
    if denoiser is not None and not_a_unet(denoiser) is None and mixes_rows(denoiser):
        return "its attention processors may read other rows of a batch, so guidance=both is the only choice"
    return None


def _is_distilled(pipeline: DiffusionPipeline, denoiser: nn.Module | None) -> bool:
    """Whether the pipeline never uses guidance with this model, whatever its scale: it asks one of two configs."""
    asks = getattr(getattr(type(pipeline), "do_classifier_free_guidance", None), "fget", None)
    names = asks.__code__.co_names if asks is not None else ()
    proj = getattr(getattr(denoiser, "config", None), "time_cond_proj_dim", None)
    distilled = getattr(getattr(pipeline, "config", None), "is_distilled", False)
    return ("time_cond_proj_dim" in names and proj is not None) or ("is_distilled" in names and bool(distilled))


def unlike_halves(pipeline: DiffusionPipeline) -> str | None:
    """Why a method that takes the batch for [unconditional, conditional] halves, or for one branch where a call has no
    guidance, would draw another image; None if it is right."""
    family = family_of(pipeline)
    if family.branches == HALVES or family.calls or family.reason == DISTILLED:
        return None
    return "the conditional half of its batch comes first" if family.branches else family.reason


def scale_argument(pipeline: DiffusionPipeline, known: Container[str]) -> str:
    """By which of its arguments, `known`, a pipeline is told the scale of guidance: `true_cfg_scale` where it has that
    and its model is not guidance-distilled (Flux schnell, Qwen-Image), else `guidance_scale`."""
    distilled = getattr(find_denoiser(pipeline), "config", {}).get("guidance_embeds", False)
    return "true_cfg_scale" if "true_cfg_scale" in known and not distilled else "guidance_scale"


def guided(pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> bool:
    """Whether a call with these `arguments` (by name, with their defaults) uses guidance at the present step."""
    family = family_of(pipeline)
    how = family.guided
    if family.calls and arguments.get("true_cfg_scale") is not None:  # beside guidance that is distilled into the model
        negative = [arguments.get(name) for name in ("negative_prompt", "negative_prompt_embeds")]
        return float(arguments["true_cfg_scale"]) > 1 and negative != [None, None]
    if how == "property":
        return bool(getattr(pipeline, "do_classifier_free_guidance", False))
    scale = arguments.get("guidance_scale")
    if scale is None:
        return False
    return float(scale) > 1 if how == "above 1" else float(scale) != 1
