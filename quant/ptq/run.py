"""From a pipeline to a quantized one, in stages that can be interrupted at any point and resumed."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffusion_accel._version import __version__
from diffusion_accel.denoisers import closed_inside, denoiser_names, find_denoiser
from diffusion_accel.errors import ConfigurationError, UnsupportedPipelineError
from diffusion_accel.finite import finite
from diffusion_accel.hooks import forward_parameters
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.progress import Progress, silent
from diffusion_accel.quant.layers import QuantizedLayer, quantized_layers
from diffusion_accel.quant.model import candidates

from .assemble import QUANTIZED, TRAINABLE, set_training
from .bits import Allocator
from .budget import PLAN, PROMPTS
from .calibration import RECORDING, relative_error
from .finetune import FINETUNING
from .folder import agree, held, read_values, write_values
from .ranges import RANGES
from .reconstruct import ROUNDING
from .search import SEARCH
from .sensitivity import PROBE, SCORES, SENSITIVITY
from .settings import QuantizeSettings
from .stage import Job, RunState, Stage
from .trainable_layer import set_quantization_state

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

STAGES = (
    PROMPTS,
    RECORDING,
    PROBE,
    SENSITIVITY,
    SCORES,
    SEARCH,
    TRAINABLE,
    PLAN,
    ROUNDING,
    RANGES,
    FINETUNING,
    QUANTIZED,
)


def quantize_denoiser(
    sampler: Sampler,
    settings: QuantizeSettings,
    work: Path,
    minutes: float | None = None,
    progress: Progress | None = None,
) -> QuantizationRun:
    """Quantize the denoiser of `sampler.pipe`; the pipeline then has the quantized one.

    Stages: record the calibration set; measure which layers suffer; choose bits (with a budget, a size or a fidelity);
    find the grids of the weights and learn their rounding; find the grids of the inputs; finetune the layers of the
    time embedding; finetune the layers that matter most.

    Args:
        sampler: the pipeline with prompts, steps and guidance; the calibration set is its own sampling trajectories.
        settings: how.
        work: a folder for what lies between; a second call with the same settings goes on from there.
        minutes: how long it may take about; iterations of rounding and finetuning are cut down to fit.
        progress: told what is being done.

    Raises:
        ConfigurationError: the folder belongs to other settings, or the budget of bits cannot be kept.
        UnsupportedPipelineError: there is nothing to quantize.
        OutputError: the folder is in use by another run, or cannot be written.
    """
    run = QuantizationRun(sampler, settings, work, progress or silent)
    run.run(minutes)
    return run


class QuantizationRun(RunState):
    """One run of quantizing: its state, and what came out."""

    def __init__(
        self,
        sampler: Sampler,
        settings: QuantizeSettings,
        work: Path,
        progress: Progress = silent,
        stages: Iterable[Stage] = STAGES,
    ) -> None:
        super().__init__(sampler, settings, work, progress, supported_denoiser(sampler.pipe))
        self.stages = stages

    def run(self, minutes: float | None = None) -> None:
        """All stages, from where an earlier run stopped. Whatever stops it, the denoiser is then as it was."""
        self.undo.callback(set_training, [(m, m.training) for m in self.denoiser.modules()])
        self.denoiser.eval()
        self.began, self.minutes = time.monotonic(), minutes
        try:
            with held(self.work):
                _check(self)
                agree(self.work, _asked(self))
                perform(self.stages, self)
            self.seconds = {name: round(seconds, 1) for name, seconds in self.seconds.items()}
        except BaseException:
            self.restore()
            raise

    @property
    def model(self) -> nn.Module:
        """The quantized denoiser."""
        return self.denoiser

    def layers(self) -> dict[str, QuantizedLayer]:
        """The quantized layers by name."""
        return quantized_layers(self.denoiser)

    def restore(self) -> None:
        """Give the pipeline its full-precision denoiser back, as it was to the bit. Safe to call twice."""
        self.undo.close()


Quantization = QuantizationRun  # old name


# ---------------------------------------------------------------------- stages
def perform(stages: Iterable[Stage], state: RunState) -> None:
    """Run the stages one after the other; what an earlier run has kept of them is loaded instead."""
    for stage in stages:
        if not stage.wanted(state):
            continue
        began = time.monotonic()
        for part in stage.parts(state):
            file = state.work / stage.file.format(part.key) if stage.file else None
            values = read_values(file) if file is not None and file.is_file() else None
            if values is None or not stage.complete(state, values):
                keep = functools.partial(write_values, file)
                values = stage.run(state, Job(part, values, keep))
                keep(values)
            stage.load(state, part, values)
        if stage.name:
            state.seconds[stage.name] = state.seconds.get(stage.name, 0.0) + time.monotonic() - began
        if stage.error:
            _note_error(state, stage.error, stage.inputs)


def _note_error(state: RunState, what: str, inputs: bool) -> None:
    """Measure the error of predictions on the validation rows."""
    set_quantization_state(state.trainable, weights=True, inputs=inputs)
    each = state.plan["error_rows"]
    rows = (state.heldout.sample(b, each, state.settings.seed) for b in range(len(state.heldout.timesteps)))
    state.validation[what] = relative_error(state.denoiser, rows)
    state.log("validation", what=what, error=round(state.validation[what], 6))


# ---------------------------------------------------------------------- checks
def supported_denoiser(pipe: DiffusionPipeline) -> nn.Module:
    """The denoiser of a pipeline, if it is one that can be quantized.

    Raises:
        UnsupportedPipelineError: there is none, several, or one that is quantized already, has adapters, takes no
            timestep, or is closed to changes.
    """
    denoiser = find_denoiser(pipe)
    what, kind = type(pipe).__name__, type(denoiser).__name__
    if denoiser is not None and getattr(denoiser, "is_quantized", False):
        raise UnsupportedPipelineError(f"the {kind} is quantized already")
    if denoiser is not None and any(hasattr(m, "base_layer") for m in denoiser.modules()):
        raise UnsupportedPipelineError(
            f"the {kind} has adapters (LoRA): fuse them (fuse_lora, then unload_lora_weights) "
            "or take them off before it is quantized; LoRAs work beside the quantized model"
        )
    if denoiser is None or not candidates(denoiser):
        raise UnsupportedPipelineError(f"{what} has no unet or transformer with layers that can be quantized")
    if len(names := denoiser_names(pipe)) > 1:
        raise UnsupportedPipelineError(
            f"{what} has {len(names)} denoisers ({', '.join(names)}), and one is quantized at a time; load it with a "
            "quantizer that takes both (quantize torchao:int8wo)"
        )
    if closed := closed_inside(pipe):
        raise UnsupportedPipelineError(f"{what} cannot be quantized: {closed}")
    if "timestep" not in forward_parameters(denoiser):
        raise UnsupportedPipelineError(f"{kind} takes no timestep")
    return denoiser


def _check(state: RunState) -> None:
    """What can be refused before anything is done."""
    count, kept = len(state.sampler.prompts), state.kept_for_validation
    if count < kept + 1:
        raise ConfigurationError(f"{count} prompts are too few: {kept} of them are kept for validation")
    wrong = next((n for n, p in state.denoiser.named_parameters() if not finite(p)), None)
    if wrong is not None:
        raise ConfigurationError(
            f"{wrong} of the {type(state.denoiser).__name__} has values that are no finite numbers"
        )
    asked = state.settings
    allocator = Allocator(state.denoiser, asked, {}, tuple(range(min(asked.bucket_count, state.sampler.steps), 0, -1)))
    if asked.bits_budget is not None:
        allocator.check_bits(asked.bits_budget)
    if asked.size_ratio is not None:
        allocator.check_ratio(asked.size_ratio)


def _asked(state: RunState) -> dict[str, Any]:
    """All that must be the same for a run to go on: what it is asked for, and the model."""
    s = state.sampler
    scheduler = getattr(s.pipe.scheduler, "config", {})
    return {
        **state.settings.to_dict(),
        "budget minutes": state.minutes,
        "prompts": list(s.prompts),
        "steps": s.steps,
        "seed of the images": s.seed,
        "batch": s.batch,
        "options": {k: v if isinstance(v, (int, float, str, type(None))) else str(v) for k, v in s.options.items()},
        "scheduler": type(s.pipe.scheduler).__name__,
        "settings of the scheduler": {k: str(v) for k, v in scheduler.items() if not k.startswith("_")},
        "pipeline": type(s.pipe).__name__.removeprefix("Accelerated"),
        "model": type(state.denoiser).__name__,
        "type of numbers": str(next(state.denoiser.parameters()).dtype),
        "weights": _hash(s.pipe),
        "version": __version__,
    }


@torch.no_grad()
def _hash(pipe: DiffusionPipeline) -> str:
    """SHA-256 over all weights of a pipeline, with the strength of adapters."""
    found = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if not isinstance(part, nn.Module):
            continue
        for key, tensor in sorted(part.state_dict().items()):
            found.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            if tensor.device.type != "meta" and type(tensor) in (torch.Tensor, nn.Parameter):
                found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        strengths = (getattr(m, "scaling", None) for m in part.modules())  # of adapters
        scales = [sorted(strength.items()) for strength in strengths if isinstance(strength, dict)]
        found.update(repr(scales).encode())
    return found.hexdigest()
