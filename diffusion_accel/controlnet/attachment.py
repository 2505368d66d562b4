"""A ControlNet beside the denoiser on a pipeline: the hook on its calls."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from diffusers.hooks import ModelHook
from torch import nn

from diffusion_accel.denoisers import find_controlnet, find_denoiser
from diffusion_accel.diffusers_compat import execution_device, has_offload_hook
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Attachment
from diffusion_accel.flops import counting
from diffusion_accel.hooks import HookSet, bind_forward, model_of
from diffusion_accel.report import several

from .beside import Beside, Job
from .controlnet_parallel import ControlNetParallel
from .later import Later

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusion_accel.steps import StepClock


def supports(feature: ControlNetParallel, pipe: DiffusionPipeline) -> str | None:
    """Why the ControlNet of a pipeline cannot run beside its denoiser; None if it can."""
    controlnet, denoiser = find_controlnet(pipe), find_denoiser(pipe)
    if controlnet is None:
        return "the pipeline has no ControlNet"
    if not isinstance(denoiser, UNet2DConditionModel):
        return f"{type(denoiser).__name__} is not known to use a ControlNet's residuals after its encoder only"
    for net in nets_of(controlnet):
        if not isinstance(net, (ControlNetModel, ControlNetUnionModel)):
            return f"{type(net).__name__} is not known to give residuals for the end of a U-Net's encoder"
    if feature.device and any(map(has_offload_hook, controlnet.modules())):
        return "its ControlNet is offloaded, so it is not at device; leave device out, or offload nothing"
    return _missing(feature.device) if feature.device else None


def attach(feature: ControlNetParallel, pipe: DiffusionPipeline) -> ControlNetParallelAttachment:
    """The feature on a pipeline that it supports."""
    return ControlNetParallelAttachment(feature, pipe)


def nets_of(controlnet: nn.Module) -> list[nn.Module]:
    """The ControlNets of a pipeline: one, or those of a wrapper."""
    model = model_of(controlnet)
    return [model_of(net) for net in getattr(model, "nets", None) or [model]]


def _missing(name: str) -> str | None:
    """Why there is no such device here; None if there is."""
    device = torch.device(name)
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count()}[device.type]
    return None if (device.index or 0) < there else f"there is no device {name}"


class ControlNetParallelAttachment(Attachment[ControlNetParallel]):
    """The hook on the ControlNet during the calls of one pipeline, and the thread that it computes in."""

    def __init__(self, feature: ControlNetParallel, pipeline: DiffusionPipeline) -> None:
        super().__init__(feature, pipeline)
        self._counters: dict[str, float] = {}

    def before_call(self, clock: StepClock) -> None:
        """Put the ControlNet where it is to compute, and the hook on it: within those of what may skip its calls."""
        pipe = clock.pipeline
        if reason := supports(self.feature, pipe):
            raise ConfigurationError(f"{self.feature.name} cannot be used on this pipeline any more: {reason}")
        controlnet: Any = find_controlnet(pipe)
        lies, home = next(controlnet.parameters()).device, execution_device(pipe)
        if self.feature.device:
            self.changes.add(functools.partial(controlnet.to, lies))
            controlnet.to(self.feature.device)
        there = next(controlnet.parameters()).device  # cuda has become cuda:0
        beside = Beside(home, home if there.type == "meta" else there)  # offloaded: it is brought for each call
        self.changes.add(beside.close)
        self._counters = {"runs_beside": 0, "runs_in_turn": 0}
        hooks = HookSet.within(self.changes, f"diffusion_accel.{self.feature.name}")
        hooks.add(controlnet, _BesideHook(beside, self._counters))
        clock.on_step(before=lambda _named: beside.wait())  # it has read the latents before they are others

    def counters(self) -> dict[str, float]:
        """What the last call did."""
        return dict(self._counters)

    def words(self) -> str:
        """The counters for people."""
        beside, in_turn = (self._counters[f"runs_{how}"] for how in ("beside", "in_turn"))
        return f"the ControlNet called {several(beside, 'time')} beside the denoiser, {in_turn:g} before it"


class _BesideHook(ModelHook):
    """On a ControlNet: its calls return at once, with residuals that come later."""

    def __init__(self, beside: Beside, counters: dict[str, float]) -> None:
        super().__init__()
        self.beside, self.counters = beside, counters

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """What stands in the place of the ControlNet's own forward."""
        forward = self.fn_ref.original_forward
        if counting() or bind_forward(module, args, kwargs).get("return_dict", True):
            self.counters["runs_in_turn"] += 1
            return self.beside.now(forward, args, kwargs)
        job = self.beside.begin(forward, args, kwargs)
        self.counters["runs_beside"] += 1
        model: Any = nets_of(module)[0]
        down = [Later.of(functools.partial(_down, job, place)) for place in range(len(model.controlnet_down_blocks))]
        return down, Later.of(lambda: job.result()[1])


def _down(job: Job, place: int) -> torch.Tensor:
    residual: torch.Tensor = job.result()[0][place]
    return residual
