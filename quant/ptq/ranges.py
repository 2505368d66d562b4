"""Ranges of activations, observed on the calibration set: a grid for every layer and bucket of timesteps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from diffusion_accel.quant.affine import grid, value_range
from diffusion_accel.quant.attention import WithScores, quantizable_attention

from .settings import RangeSettings
from .stage import Job, Part, RunState, Stage, Values
from .trainable_layer import TrainableLayer, set_quantization_state

if TYPE_CHECKING:
    from .calibration import CalibrationSet, Rows


class Observer:
    """Watches values of one tensor over the chunks of one bucket."""

    def __init__(self, bits: int, parts: list[int] | None, dim: int, settings: RangeSettings, margin: int = 0) -> None:
        self.bits, self.parts, self.dim, self.settings, self.margin = bits, parts, dim, settings, margin
        self.ends: torch.Tensor | None = None

    def see(self, x: torch.Tensor) -> None:
        """Update the range with one chunk of values."""
        x = x.detach().float()
        if self.parts is None:  # a grid for each channel
            rows = [x.transpose(0, self.dim).flatten(1)]
        else:
            rows = [part.reshape(1, -1) for part in x.split(self.parts, self.dim)]
        found = torch.cat([value_range(r, self.bits, self.settings.percentiles, self.margin) for r in rows])
        momentum = self.settings.momentum
        if self.ends is None:
            self.ends = found
        elif momentum is not None:
            self.ends = momentum * self.ends + (1 - momentum) * found

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, (K,)."""
        assert self.ends is not None
        return grid(self.ends[:, 0], self.ends[:, 1], self.bits, margin=self.margin)


@torch.no_grad()
def observe(
    model: nn.Module,
    layers: dict[str, TrainableLayer],
    calibration: CalibrationSet,
    settings: RangeSettings,
    buckets: Iterable[int],
    attentions: Iterable[str] = (),
) -> dict[str, torch.Tensor]:
    """Set the grids of inputs and outputs of all layers at `buckets`; returns the largest attention probabilities.

    The model runs as it is switched: with rounded weights, what they do to the ranges is in them.
    """
    peaks: dict[str, torch.Tensor] = {name: torch.zeros(len(calibration.timesteps)) for name in attentions}
    for number in buckets:
        watchers: dict[tuple[TrainableLayer, str], Observer] = {}
        for layer in layers.values():
            width = layer.weight.shape[1]
            if layer.spec.activation_bits and not layer.spec.dynamic:
                parts = None if layer.spec.per_channel else layer.spec.part_sizes(width)
                watchers[layer, "input"] = Observer(
                    layer.spec.activation_bits, parts, layer.channel_dim, settings, layer.spec.zero_margin
                )
            if layer.spec.output_bits:
                watchers[layer, "output"] = Observer(layer.spec.output_bits, [layer.weight.shape[0]], -1, settings)
        if not watchers and not peaks:
            continue
        handles: list[Any] = []
        for (layer, what), watcher in watchers.items():
            if what == "input":
                see = lambda at, args, w=watcher: w.see(at.to_inner(args[0]))  # noqa: E731
                handles.append(layer.register_forward_pre_hook(see))
            else:
                look = lambda _, _args, out, w=watcher: w.see(out)  # noqa: E731
                handles.append(layer.register_forward_hook(look))
        for name, peak in peaks.items():
            handles.append(_WatchScores(model.get_submodule(name), peak, number))
        try:
            for rows in _some(calibration, number, settings):
                rows.run(model)
        finally:
            for handle in handles:
                handle.remove()
        for (layer, what), watcher in watchers.items():
            if watcher.ends is None:  # a layer that did not run keeps what it has, a step of 1
                continue
            scale, zero = watcher.grid()
            getattr(layer, f"{what}_scale").data[number] = scale
            getattr(layer, f"{what}_zero_point")[number] = zero
    return peaks


def _some(calibration: CalibrationSet, number: int, settings: RangeSettings) -> Iterator[Rows]:
    rows = calibration.sample(number, settings.rows, seed=0)
    for start in range(0, len(rows), settings.chunk):
        yield rows.pick(torch.arange(start, min(start + settings.chunk, len(rows))))


class _WatchScores:
    """Notes the largest probability that an attention module computes, until it is removed."""

    def __init__(self, attention: Any, peak: torch.Tensor, number: int) -> None:
        self.attention, self.before = attention, attention.processor

        def note(probabilities: torch.Tensor) -> torch.Tensor:
            peak[number] = max(float(peak[number]), float(probabilities.max()))
            return probabilities

        class Watching(AttnProcessor):
            def __call__(self, attn: Any, *args: object, **kwargs: object) -> Any:
                return super().__call__(WithScores(attn, note), *args, **kwargs)

        attention.set_processor(Watching())

    def remove(self) -> None:
        self.attention.set_processor(self.before)


# ---------------------------------------------------------------------- the stage
def _parts(state: RunState) -> Iterator[Part]:
    """The timesteps, watched with rounded weights."""
    s, attentions = state.settings, list[str]()
    if s.softmax_bits is not None and s.activation_bits:
        attentions = [name for name, m in state.denoiser.named_modules() if quantizable_attention(m)]
    count = len(state.calibration.timesteps)
    state.peaks = {name: torch.zeros(count) for name in attentions}
    set_quantization_state(state.trainable, weights=True, inputs=False)
    for number in range(count):
        yield Part(number, number)


def _watch(state: RunState, job: Job) -> Values:
    number: int = job.part.given
    count = len(state.calibration.timesteps)
    state.tell(f"ranges: timestep {number + 1} of {count}", "ranges", number / count)
    watch = replace(state.settings.observation, rows=state.plan["range_rows"])
    peaks = observe(state.denoiser, state.trainable, state.calibration, watch, [number], state.peaks)
    found = {f"{n}.{k}": getattr(m, k).data[number].clone() for n, m in state.trainable.items() for k in m.grids()}
    return found | {f"{name}.peak": peak[number].clone() for name, peak in peaks.items()}


def _take(state: RunState, part: Part, values: Values) -> None:
    number: int = part.given
    for name, layer in state.trainable.items():
        for key in layer.grids():
            getattr(layer, key).data[number] = values[f"{name}.{key}"]
    for name, peak in state.peaks.items():
        peak[number] = values[f"{name}.peak"]


RANGES = Stage(
    "ranges",
    _watch,
    _take,
    "ranges-{:04d}.safetensors",
    parts=_parts,
    wanted=lambda state: bool(state.settings.activation_bits),
    error="quantized",
    inputs=True,
)
