"""Accelerators of other people for U-Nets, as their authors tell people to use them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusion_accel.denoisers import find_denoisers, not_a_unet

from .peers import Call, Settings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .runner import Runner


def unfit(kind: str, pipe: DiffusionPipeline) -> str | None:
    """That a pipeline has no U-Net; None if it has one."""
    reasons = [not_a_unet(denoiser) for denoiser in find_denoisers(pipe)]
    reason = reasons[0] if reasons else "the pipeline has no unet"
    return None if reason is None else f"{kind} is for U-Nets, and {reason}"


def deepcache(settings: Settings, runner: Runner) -> Call:
    """DeepCache (Ma et al. 2023, arXiv 2312.00858), by its own package."""
    from DeepCache import DeepCacheSDHelper  # optional package

    helper = DeepCacheSDHelper(pipe=runner.pipe)
    helper.set_params(cache_interval=settings["interval"], cache_branch_id=settings["branch"])
    helper.enable()

    def call(**arguments: Any) -> Any:
        helper.start_timestep = None  # it keeps the first timestep of its first call otherwise
        return runner.pipe(**arguments)

    return call


def tomesd(settings: Settings, runner: Runner) -> Call:
    """Token merging (Bolya and Hoffman 2023, arXiv 2303.17604), by its own package."""
    import tomesd  # optional package

    tomesd.apply_patch(runner.pipe, ratio=settings["ratio"])
    return runner.pipe


def tgate(settings: Settings, runner: Runner) -> Call:
    """TGATE (Zhang et al. 2024, arXiv 2404.02747), by its own package."""
    import tgate  # optional package

    pipe: Any = runner.pipe
    xl = type(pipe).__name__.startswith("StableDiffusionXL")
    (tgate.TgateSDXLLoader if xl else tgate.TgateSDLoader)(pipe)

    def call(**arguments: Any) -> Any:
        return pipe.tgate(**arguments, gate_step=min(settings["step"], runner.job.steps - 1))

    return call
