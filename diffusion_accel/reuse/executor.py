"""The executor of encoder reuse: hooks that run, skip or batch the stages of a U-Net for one pipeline call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from ..denoisers import (
    BATCH_ARGUMENTS,
    RESIDUAL_ARGUMENTS,
    find_controlnet,
    find_denoiser,
    prediction,
    rows_are_independent,
    unet_stages,
    with_prediction,
)
from ..hooks import HookSet, bind_forward, map_tensors, tensor_bytes, tensors_in
from ..steps import StepClock
from .schedule import key_steps


@dataclass
class Features:
    """What one key step left for the steps after it.

    Attributes:
        segment, shape: for which pass over the timesteps and which input shape the features are valid.
        hidden: the input of the first up block (mid block output and what ControlNets added), (B, C, h, w).
        skips: the skip connections of each up block, in the order of the up blocks.
        placeholders: memory-less stand-ins with the shapes of the encoder stages' outputs.
        ready: predictions decoded ahead, by step index.
        conditions: the tensors other than latents and timestep with which `ready` was decoded.
    """

    segment: int
    shape: tuple[Any, ...]
    hidden: torch.Tensor | None = None
    skips: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    placeholders: dict[int, Any] = field(default_factory=dict)
    ready: dict[int, Any] = field(default_factory=dict)
    conditions: list[torch.Tensor] = field(default_factory=list)

    def bytes(self) -> int:
        return tensor_bytes([self.hidden, *self.skips.values()])


@dataclass
class Pass:
    """One call of the U-Net: whether its encoder runs, and how many steps its decoder serves."""

    features: Features
    encode: bool
    steps: int


class ReuseRun:
    """Encoder reuse during one call of a pipeline."""

    def __init__(self, feature: Any, pipeline: Any, clock: StepClock, counters: dict[str, float]) -> None:
        self.feature = feature
        self.clock = clock
        self.counters = counters
        denoiser = find_denoiser(pipeline)
        assert denoiser is not None
        self.denoiser = denoiser
        self.controlnet = find_controlnet(pipeline)
        self.stages = unet_stages(denoiser)
        self.batching = feature.batch_decoder and rows_are_independent(denoiser)
        self.current: Pass | None = None
        self.cache: dict[int, Features] = {}  # by the number of the call within a step
        self._keys: frozenset[int] = frozenset()
        self._keys_segment = -1
        self._hooks = HookSet("diffusion_accel.encoder_reuse")
        names = ("encoder_runs", "decoder_runs", "decoder_steps", "full_steps", "reused_steps", "peak_cache_bytes")
        counters.update(dict.fromkeys(names, 0))
        if self.controlnet is not None:
            counters.update(controlnet_runs=0, controlnet_skipped=0)

    def install(self) -> None:
        """Put the hooks on the U-Net's stages, the U-Net itself and the ControlNet."""
        for i, stage in enumerate(self.stages.encoder):
            self._hooks.add(stage, EncoderStageHook(self, i))
        for i, stage in enumerate(self.stages.up):
            self._hooks.add(stage, DecoderStageHook(self, i))
        self._hooks.add(self.denoiser, DenoiserHook(self))
        if self.controlnet is not None:
            self._hooks.add(self.controlnet, ControlNetHook(self))

    def uninstall(self) -> None:
        """Remove the hooks and free every cached tensor."""
        self._hooks.remove()
        self.cache.clear()
        self.current = None

    # ------------------------------------------------------------------ the plan
    def is_key(self, index: int) -> bool:
        """Whether the encoder runs at step `index` of the current segment."""
        if self._keys_segment != self.clock.segment:
            self._keys_segment = self.clock.segment
            self._keys = key_steps(self.feature.schedule, self.clock.total)
        return index in self._keys or index >= self.clock.total

    def group(self, index: int, features: Features) -> int:
        """How many steps the decoder serves in one batch from step `index` on."""
        if not self.batching or not self.clock.exact:
            return 1
        end = index + 1
        while end < self.clock.total and not self.is_key(end):
            end += 1
        size = features.bytes()
        if not size:  # a first key step: decode it alone, then its features' size is known
            return 1
        return max(1, min(end - index, int(self.feature.max_group_mb * 2**20 // size)))


class DenoiserHook(ModelHook):
    """On the U-Net: decides what this call does, serves predictions decoded ahead, stacks the steps of a group."""

    def __init__(self, run: ReuseRun) -> None:
        super().__init__()
        self.run = run

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run, clock = self.run, self.run.clock
        named = bind_forward(module, args, kwargs)
        slot, index = clock.call, clock.index
        sample = named["sample"]
        shape = (tuple(sample.shape), sample.dtype, sample.device)
        conditions = tensors_in(
            {k: v for k, v in named.items() if k not in ("sample", "timestep", *RESIDUAL_ARGUMENTS)}
        )
        features = run.cache.get(slot)
        encode = run.is_key(index) or features is None or features.segment != clock.segment or features.shape != shape
        if features is None or features.segment != clock.segment or features.shape != shape:
            features = run.cache[slot] = Features(clock.segment, shape)
        elif not encode and index in features.ready:
            output = features.ready.pop(index)
            if len(conditions) == len(features.conditions) and all(
                a is b for a, b in zip(conditions, features.conditions, strict=True)
            ):
                run.counters["reused_steps"] += 1
                return output
            features.ready.clear()  # text or conditions were changed during the call: decode with the new ones
        steps = run.group(index, features) if _can_stack(named) else 1
        if encode:
            features.hidden, features.skips, features.ready = None, {}, {}
        else:
            named.update({k: None for k in RESIDUAL_ARGUMENTS if k in named})
        if steps > 1:
            named = _stacked(named, steps, clock.upcoming(steps))
        run.current = Pass(features, encode, steps)
        try:
            output = self.fn_ref.original_forward(**named)
        finally:
            run.current = None
        run.counters["encoder_runs"] += encode
        run.counters["decoder_runs"] += 1
        run.counters["decoder_steps"] += steps
        run.counters["full_steps" if encode else "reused_steps"] += 1
        if encode:  # the kept features change at key steps only
            held = sum(f.bytes() for f in run.cache.values())
            run.counters["peak_cache_bytes"] = max(run.counters["peak_cache_bytes"], held)
        if steps == 1:
            return output
        chunks = prediction(output).chunk(steps)
        features.conditions = conditions
        features.ready = {index + j: with_prediction(output, chunk) for j, chunk in enumerate(chunks)}
        return features.ready.pop(index)


class EncoderStageHook(ModelHook):
    """On conv_in, each down block and the mid block: runs the stage at key steps, else only pretends to."""

    def __init__(self, run: ReuseRun, stage: int) -> None:
        super().__init__()
        self.run = run
        self.stage = stage

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        current = self.run.current
        if current is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        if not current.encode:
            return current.features.placeholders[self.stage]
        if current.steps > 1:
            # The batch was stacked for the decoder; the encoder needs its first rows only.
            if self.stage == 0:
                args, kwargs = map_tensors(lambda t: _first(t, current.steps), (args, kwargs))
            else:
                named = bind_forward(module, args, kwargs)
                for key in BATCH_ARGUMENTS & named.keys():
                    named[key] = map_tensors(lambda t: _first(t, current.steps), named[key])
                args, kwargs = (), named
        output = self.fn_ref.original_forward(*args, **kwargs)
        current.features.placeholders[self.stage] = map_tensors(_placeholder, output)
        return output


class DecoderStageHook(ModelHook):
    """On each up block: keeps its inputs at key steps, puts them in at the others, repeats them for a group."""

    def __init__(self, run: ReuseRun, stage: int) -> None:
        super().__init__()
        self.run = run
        self.stage = stage

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        current = self.run.current
        if current is None:
            return args, kwargs
        named = bind_forward(module, args, kwargs)
        features = current.features
        if current.encode:
            features.skips[self.stage] = named["res_hidden_states_tuple"]
            if self.stage == 0:
                features.hidden = named["hidden_states"].clone()  # FreeU scales the original in place
        else:
            named["res_hidden_states_tuple"] = features.skips[self.stage]
            if self.stage == 0:
                assert features.hidden is not None
                named["hidden_states"] = features.hidden.clone()
        if current.steps > 1:
            keys = ("res_hidden_states_tuple", "hidden_states") if self.stage == 0 else ("res_hidden_states_tuple",)
            for key in keys:
                named[key] = map_tensors(lambda t: _repeat(t, current.steps), named[key])
        return (), named


class ControlNetHook(ModelHook):
    """On the ControlNet: runs it at key steps and hands out its last residuals at the others."""

    def __init__(self, run: ReuseRun) -> None:
        super().__init__()
        self.run = run
        self._kept: dict[int, tuple[Any, Any]] = {}

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run, clock = self.run, self.run.clock
        sample = bind_forward(module, args, kwargs)["sample"]
        state = (clock.segment, tuple(sample.shape), sample.dtype, sample.device)
        kept = self._kept.get(clock.call)
        if not run.is_key(clock.index) and kept is not None and kept[0] == state:
            run.counters["controlnet_skipped"] += 1
            return kept[1]
        self._kept.pop(clock.call, None)
        output = self.fn_ref.original_forward(*args, **kwargs)
        run.counters["controlnet_runs"] += 1
        self._kept[clock.call] = (state, output)
        return output


# ---------------------------------------------------------------------- rows
def _can_stack(named: dict[str, Any]) -> bool:
    """Whether the rows of several steps can share a batch (per-call attention inputs may refer to row numbers)."""
    attention = named.get("cross_attention_kwargs") or {}
    return set(attention) <= {"scale", "ip_adapter_masks"} and named["sample"].shape[0] > 0


def _stacked(named: dict[str, Any], steps: int, timesteps: torch.Tensor) -> dict[str, Any]:
    """The U-Net's arguments for `steps` steps at once: rows of the first step, then of the second, …"""
    batch = named["sample"].shape[0]

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        return _repeat(tensor, steps) if tensor.dim() and tensor.shape[0] % batch == 0 else tensor

    kept = {"timestep", "cross_attention_kwargs", *RESIDUAL_ARGUMENTS}
    stacked = {k: v if k in kept else map_tensors(repeat, v) for k, v in named.items()}
    stacked["timestep"] = timesteps.to(named["sample"].device).repeat_interleave(batch)
    return stacked


def _repeat(tensor: torch.Tensor, steps: int) -> torch.Tensor:
    return tensor.repeat(steps, *([1] * (tensor.dim() - 1)))


def _first(tensor: torch.Tensor, steps: int) -> torch.Tensor:
    return tensor[: tensor.shape[0] // steps]


def _placeholder(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
