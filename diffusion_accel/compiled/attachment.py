"""Compiled models on a pipeline: which modules, and the hook that puts a graph in the place of each one's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from diffusion_accel.denoisers import called_denoisers, closed_inside, denoiser_names, find_controlnet, find_denoisers
from diffusion_accel.denoisers.find import DECODERS
from diffusion_accel.diffusers_compat import execution_device, has_offload_hook, repeated_blocks
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Attachment
from diffusion_accel.hooks import HookSet, model_of
from diffusion_accel.report import several

from .compiled import Compiled
from .engine import Target
from .graphs import COUNTERS, Counters, Graphs, graphs_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusion_accel.steps import StepClock

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def supports(feature: Compiled, pipe: DiffusionPipeline) -> str | None:
    """Why nothing of a pipeline can be compiled like this here; None if it can."""
    if not called_denoisers(pipe):
        return "the pipeline has no unet or transformer"
    if feature.blocks and (reason := no_blocks(pipe)):
        return reason
    if not feature.closes_inside():
        return None
    engine = feature.compiler
    if reason := engine.missing():
        return reason
    for name, module in zip(denoiser_names(pipe), called_denoisers(pipe), strict=True):
        if closed_inside(pipe) or model_of(module) is not module:
            return f"its {name} is compiled or wrapped already; give the pipeline the plain model"
    if (kind := execution_device(pipe).type) not in engine.machines:
        return f"{engine.name} takes models on {' or '.join(engine.machines)}, this one is on {kind}"
    return engine.refusal(Target(feature.precision, feature.device, feature.mode, torch.get_num_threads()))


def works_inside(_feature: Compiled, _pipe: DiffusionPipeline) -> bool:
    """It stands at calls of whole models."""
    return False


def attach(feature: Compiled, pipe: DiffusionPipeline) -> CompiledAttachment:
    """The feature on a pipeline that it supports."""
    return CompiledAttachment(feature, pipe)


def no_blocks(pipe: DiffusionPipeline) -> str | None:
    """Why the repeated blocks of a pipeline's denoisers cannot be compiled; None if they can."""
    for denoiser in find_denoisers(pipe):
        name = type(denoiser).__name__
        if not blocks_of(denoiser):
            return f"{name} names no blocks that repeat; compile it as a whole"
        if any(map(has_offload_hook, blocks_of(denoiser))):
            return f"the blocks of {name} are offloaded one by one; use another way of offloading"
    return None


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks of a denoiser that repeat."""
    return [module for module in denoiser.modules() if type(module).__name__ in repeated_blocks(denoiser)]


def modules_of(pipe: Any, parts: frozenset[str]) -> list[nn.Module]:
    """The modules of these parts that an accelerated pipeline and its features call."""
    found: list[Any] = list(called_denoisers(pipe)) if "denoiser" in parts else []
    if "vae" in parts:
        coders = [getattr(pipe, name, None) for name in DECODERS]
        found += [getattr(coder, half, None) for coder in coders for half in ("encoder", "decoder")]
        found += pipe.acceleration.models()
    if "text" in parts:
        found += [getattr(pipe, name, None) for name in TEXT_ENCODERS]
    if "controlnet" in parts and (controlnet := find_controlnet(pipe)) is not None:
        found += list(getattr(controlnet, "nets", None) or [controlnet])
    return [module for module in found if isinstance(module, nn.Module)]


class CompiledAttachment(Attachment[Compiled]):
    """Graphs in the place of the models' own forwards during the calls of one pipeline."""

    def __init__(self, feature: Compiled, pipeline: DiffusionPipeline) -> None:
        super().__init__(feature, pipeline)
        self._counters: Counters = {}
        self._blocks: dict[nn.Module, Callable[..., object]] = {}  # with their compiled forwards

    def before_call(self, clock: StepClock) -> None:
        """Put the hooks on. They are the first, so they lie below those of all other features."""
        if reason := supports(self.feature, clock.pipeline):
            raise ConfigurationError(f"{self.feature.name} cannot be used on this pipeline any more: {reason}")
        self._counters = dict.fromkeys(COUNTERS, 0)
        if self.feature.blocks:
            self._compile_blocks(clock.pipeline)
            return
        self._put_on(modules_of(clock.pipeline, self.feature.object_of("parts")))

    def before_output(self) -> None:
        """Put the hooks on what features make the output with."""
        if not self.feature.blocks and "vae" in self.feature.object_of("parts"):
            self._put_on(self.pipeline.acceleration.models())

    def _put_on(self, modules: list[nn.Module]) -> None:
        hooks = HookSet.within(self.changes, "diffusion_accel.compiled")
        for module in modules:
            graphs = graphs_of(module, self.feature)
            graphs.fresh = True
            hooks.add(module, GraphHook(graphs, self._counters))

    def _compile_blocks(self, pipe: DiffusionPipeline) -> None:
        """Put compiled forwards in the place of the blocks' own; they compile when they are called."""
        feature, engine = self.feature, self.feature.compiler
        target = Target(feature.precision, mode=feature.mode, threads=torch.get_num_threads())
        blocks = [block for denoiser in find_denoisers(pipe) for block in blocks_of(denoiser)]
        blocks = [block for block in blocks if "forward" not in vars(block)]
        assert engine.compile_block is not None
        self._blocks = {block: self._blocks.get(block) or engine.compile_block(block, target) for block in blocks}
        for block, compiled in self._blocks.items():
            self.changes.set(block, "forward", compiled)

    def counters(self) -> Counters:
        """What the last call did."""
        return {**self._counters, "compile_seconds": round(self._counters.get("compile_seconds", 0), 3)}

    def words(self) -> str:
        """The counters for people."""
        if self.feature.blocks:
            return "repeated blocks compiled; their calls are not counted"
        count = {**dict.fromkeys(COUNTERS, 0.0), **self._counters}
        said = f"{several(count['graph_calls'], 'call')} by compiled graphs, {count['eager_calls']:g} by torch"
        made = {"compiled": count["graphs_compiled"], "read from the cache": count["graphs_loaded"]}
        graphs = [f"{several(number, 'graph')} {how}" for how, number in made.items() if number]
        return f"{said}; {' and '.join(graphs)} in {count['compile_seconds']:.1f} s" if graphs else said


class GraphHook(ModelHook):
    """On a module that is compiled: its calls run a graph."""

    def __init__(self, graphs: Graphs, counters: Counters) -> None:
        super().__init__()
        self.graphs, self.counters = graphs, counters

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """What stands in the place of the module's own forward."""
        return self.graphs.run(module, self.fn_ref.original_forward, args, kwargs, self.counters)
