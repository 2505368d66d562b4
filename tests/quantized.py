"""Small pipelines and settings for tests of quantization."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import zoo

from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.quant.model import candidates
from diffusion_accel.quant.ptq.calibration import CalibrationSet
from diffusion_accel.quant.ptq.finetune import FinetuneSettings
from diffusion_accel.quant.ptq.reconstruct import RoundingSettings
from diffusion_accel.quant.ptq.run import quantize_denoiser
from diffusion_accel.quant.ptq.settings import QuantizeSettings
from diffusion_accel.quant.ptq.trainable_layer import TrainableLayers
from diffusion_accel.quant.spec import LayerSpec

WHOLE = QuantizeSettings(
    weight_bits=3,
    buckets=3,
    rounding=RoundingSettings(iterations=60, rows=12, batch=6, rate=5e-3),
    finetune=FinetuneSettings(time_epochs=(4, 2, 3), time_rows=4, epochs=4, rows=8, batch=4, rate=1e-4),
)


SHORT = replace(  # all stages, for what does not hang on how far they come
    WHOLE,
    rounding=replace(WHOLE.rounding, iterations=8),
    finetune=replace(WHOLE.finetune, time_epochs=(1, 1, 1), epochs=2),
)


def sampler(count: int = 8) -> Sampler:
    pipe, _ = zoo.unet2d()
    pipe.set_progress_bar_config(disable=True)
    return Sampler(pipe, ("",) * count, 4, batch=4)


def drafted(calibration: CalibrationSet, bits: int = 3) -> tuple[Any, TrainableLayers]:
    model = copy.deepcopy(sampler().pipe.unet)
    names = list(candidates(model))
    return model, TrainableLayers(
        model, {n: LayerSpec(weight_bits=bits, activation_bits=8) for n in names}, calibration.timesteps
    )


class Killed(BaseException):
    pass


TINY = QuantizeSettings(weight_bits=4, buckets=3, rounding=None, finetune=None)


def tiny_pipeline() -> Any:
    pipe, _ = zoo.unet2d()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(folder: Path, settings: QuantizeSettings) -> Path:
    """A quantized DDPM pipeline folder in `folder`."""
    pipe = tiny_pipeline()
    quantize_denoiser(Sampler(pipe, ("",) * 4, 4, batch=2), settings, folder / "work")
    pipe.save_pretrained(folder / "pipe")
    return folder / "pipe"


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return Sampler(pipe, ("",) * 2, 4).images()


class Prompted(Sampler):
    """A sampler for pipelines of the zoo, which have embeddings instead of prompts."""

    def __init__(self, pipe: Any, call: dict[str, Any]) -> None:
        super().__init__(pipe, ("",) * 4, 4, batch=1, options=call)
        object.__setattr__(self, "given", call)
        pipe.set_progress_bar_config(disable=True)

    def call(self, start: int, end: int, **changes: Any) -> torch.Tensor:
        return torch.stack([zoo.run(self.pipe, self.given, self.steps, seed) for seed in range(start, end)])  # type: ignore[attr-defined]

    def part(self, start: int, end: int) -> Prompted:
        made = Prompted(self.pipe, self.given)  # type: ignore[attr-defined]
        object.__setattr__(made, "prompts", self.prompts[start:end])
        return made


def traces(model: Any) -> list[Any]:
    """What quantizing changes on a model besides its results: learning, training, attributes, and that it copies."""
    twin = copy.deepcopy(model)
    config = {k: v for k, v in twin.config.items() if k[0] != "_"}  # saving adds notes of diffusers
    modules = [(type(m), m.training, sorted(vars(m))) for m in twin.modules()]
    return [config, modules, [(n, p.requires_grad, p.stride()) for n, p in twin.named_parameters()]]
