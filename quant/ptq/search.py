"""The smallest checkpoint whose images are as near to full precision as is asked for."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.measure.fidelity import fidelity
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.quant.model import quantized_table, tables
from diffusion_accel.quant.spec import LayerSpec

from .bits import Allocator
from .ranges import observe
from .stage import Job, Part, RunState, Stage, Values
from .trainable_layer import TrainableLayers, set_quantization_state

STEP = 0.002  # of sizes, as a share of float32
OTHER_SEEDS = 200_000  # the images of the search are not those of the recording, nor of the report


def _search(state: RunState, job: Job) -> Values:
    """A bisection over sizes, each with its allocation and measured images; what was measured before an interruption
    is not measured again."""
    asked = state.settings.min_psnr
    assert asked is not None
    count = len(state.sampler.prompts)
    sampler = state.sampler.part(count - state.kept_for_validation, count)
    sampler = replace(sampler, seed=sampler.seed + OTHER_SEEDS)
    allocator = Allocator(
        state.denoiser, state.settings, state.needs, state.calibration.timesteps, state.scores or None
    )
    least, most = (allocator.ratio(allocator.specs(allocator.costs(most))) for most in (False, True))
    low, high = math.floor(least / STEP), math.ceil(most / STEP)
    tried: dict[str, float] = dict((job.kept or {}).get("tried", {}))
    base: list[torch.Tensor] = []

    def keeps(place: int) -> bool:
        size = f"{place * STEP:.3f}"
        if size not in tried:
            if not base:
                base.append(sampler.images())
            state.tell(f"search: {size} of float32")
            images = _images(state, sampler, allocator.within_ratio(float(size)))
            tried[size] = round(fidelity(base[0], images).psnr_median, 2)
            state.log("search", size_ratio=float(size), psnr=tried[size])
            job.keep({"tried": tried})
        return tried[size] >= asked

    if not keeps(high):
        raise ConfigurationError(
            f"min_psnr {asked:g} dB cannot be kept: the largest checkpoint ({most:.3f} of float32) keeps "
            f"{tried[f'{high * STEP:.3f}']:g} dB; ask for less, or for more bits of inputs"
        )
    while high - low > 1:  # the size at `low` does not do, or is below the smallest
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return {"tried": tried, "size_ratio": round(high * STEP, 3), "images": len(sampler.prompts)}


@torch.no_grad()
def _images(state: RunState, sampler: Sampler, specs: dict[str, LayerSpec]) -> torch.Tensor:
    """Images with everything rounded to nearest."""
    denoiser = state.denoiser
    plain = tables(denoiser)
    for name, table in plain.items():
        denoiser.set_submodule(name, quantized_table(table))
    timesteps = state.calibration.timesteps
    trainable = TrainableLayers(denoiser, specs, timesteps, state.settings.search)
    try:
        set_quantization_state(trainable, weights=True, inputs=False)
        numbers = range(len(timesteps))
        observe(denoiser, trainable, state.calibration, state.settings.observation, numbers)
        set_quantization_state(trainable, weights=True, inputs=True)
        return sampler.images()
    finally:
        trainable.restore()
        for name, table in plain.items():
            denoiser.set_submodule(name, table)


def _take(state: RunState, _part: Part, values: Values) -> None:
    state.search = values


SEARCH = Stage(
    "search",
    _search,
    _take,
    "search.json",
    wanted=lambda state: state.settings.min_psnr is not None,
    complete=lambda _state, values: "size_ratio" in values,
)
