"""How large the channels of inputs become, and the factors that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from diffusion_accel.denoisers import edge_layers
from diffusion_accel.quant.model import candidates
from diffusion_accel.quant.transforms import smoothing

from .calibration import Rows
from .stage import Job, Part, RunState, Stage, Values

_ROWS = 16  # of each timestep


@torch.no_grad()
def channel_peaks(model: nn.Module, layers: Mapping[str, nn.Module], parts: Iterable[Rows]) -> dict[str, torch.Tensor]:
    """The largest magnitude of each input channel of each layer that runs, (C,)."""
    found: dict[str, torch.Tensor] = {}

    def watch(name: str, layer: nn.Module) -> Callable[..., None]:
        def see(_module: nn.Module, args: tuple[Any, ...]) -> None:
            dim = 1 if isinstance(layer, nn.Conv2d) else -1
            peaks = args[0].detach().float().abs().movedim(dim, -1).flatten(0, -2).amax(0)
            found[name] = torch.maximum(found[name], peaks) if name in found else peaks

        return see

    handles = [layer.register_forward_pre_hook(watch(name, layer)) for name, layer in layers.items()]
    try:
        for rows in parts:
            rows.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _watch(state: RunState, _job: Job) -> Values:
    edges = edge_layers(state.denoiser)
    layers = {name: layer for name, layer in candidates(state.denoiser).items() if name not in edges}
    count, seed = len(state.calibration.timesteps), state.settings.seed
    peaks = channel_peaks(state.denoiser, layers, (state.calibration.sample(b, _ROWS, seed) for b in range(count)))
    strength = state.settings.smooth
    assert strength is not None
    found = {}
    for name, layer in layers.items():
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        seen = peaks.get(name, torch.ones(weight.shape[1], device=weight.device))  # one that does not run
        found[name] = smoothing(seen, weight, strength)
    return found


def _take(state: RunState, _part: Part, values: Values) -> None:
    state.factors = values


SMOOTHING = Stage("smoothing", _watch, _take, "smoothing.safetensors", wanted=lambda s: s.settings.smooth is not None)
