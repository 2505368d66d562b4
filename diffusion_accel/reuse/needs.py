"""What a plan needs of a pipeline, its denoiser and its scheduler, asked before anything is attached."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from diffusion_accel.denoisers import (
    family_of,
    find_denoisers,
    is_ragged,
    layers_per_block,
    no_branches,
    not_a_unet,
    not_followed,
    reads_every_step,
)
from diffusion_accel.prediction import Conversion

from . import block_hooks, unet_hooks
from .fitted_steps import unfit_scheduler
from .plan import Kinds, PlanSource

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


def supports(source: PlanSource, pipe: DiffusionPipeline) -> str | None:
    """Why a pipeline cannot follow the plans of a source; None if it can."""
    if reason := unfollowable(pipe):
        return reason
    kinds = source.for_model(layers_per_block(pipe)).kinds()
    if kinds.parts_branches and (reason := no_branches(pipe)):
        return reason if kinds.leaves_branches_out else f"the plan's fits need both branches of guidance, and {reason}"
    if kinds.leaves_branches_out and (reason := uneven_streams(pipe, kinds)):
        return reason
    if kinds.fitted and (reason := _no_fits(pipe)):
        return reason
    reasons = (unmet_need(denoiser, pipe.scheduler, kinds) for denoiser in find_denoisers(pipe))
    return next(filter(None, reasons), None)


def uneven_streams(pipe: DiffusionPipeline, kinds: Kinds) -> str | None:
    """Why a plan with these kinds of steps cannot leave a branch of guidance out, though others can; None if it can."""
    if not kinds.depths or not any(map(is_ragged, find_denoisers(pipe))):
        return None
    return "its streams are as long as the longest text of both branches: shallow steps need guidance=both here"


def no_loop(pipe: DiffusionPipeline) -> str | None:
    """That a pipeline lacks what every plan is about; None if it has it."""
    if not find_denoisers(pipe):
        return "the pipeline has no unet or transformer"
    if getattr(pipe, "scheduler", None) is None:
        return "the pipeline has no scheduler to take the steps from"
    return None


def unfollowable(pipe: DiffusionPipeline) -> str | None:
    """Why no step of a pipeline can be left out; None if some can."""
    return no_loop(pipe) or reads_every_step(pipe) or not_followed(pipe)


def _no_fits(pipe: DiffusionPipeline) -> str | None:
    """Why nothing can be put in the place of what the scheduler of a pipeline is given; None if it can."""
    if family_of(pipe).views:
        return "its scheduler steps once for each view of the image, so no step can have a fit; use hold without one"
    return unfit_scheduler(pipe.scheduler)


def unmet_need(denoiser: nn.Module, scheduler: SchedulerMixin, kinds: Kinds) -> str | None:
    """Why a denoiser cannot follow a plan with these kinds of steps; None if it can."""
    if any(kinds.spaces | dict.fromkeys(kinds.fitted_spaces, 0)) and not Conversion(scheduler).possible:
        return (
            f"with {type(scheduler).__name__} a prediction cannot be turned into noise or clean sample; "
            "use hold, and fits, without epsilon or sample"
        )
    parts = unet_hooks if not_a_unet(denoiser) is None else block_hooks
    return parts.missing_parts(denoiser, kinds)
