"""Watching one call of a pipeline, so that its denoiser can be called without it (`replay`).

If the denoiser is told the same at every step but for latents and timestep, and what the scheduler is given is always
the same sum of its outputs (guidance is such a sum), then both can be repeated. Whatever is not so is not repeated but
refused, so nothing is guessed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from diffusion_accel.combination import channel_dim
from diffusion_accel.denoisers import (
    PipelineFamily,
    called_denoisers,
    family_of,
    latents_argument,
    latents_of,
    like_latents,
    no_branches,
    prediction,
    time_argument,
)
from diffusion_accel.errors import UnsupportedPipelineError
from diffusion_accel.hooks import HookSet, bind_forward
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.prediction import model_input
from diffusion_accel.reuse.call_arguments import Arguments
from diffusion_accel.steps import StepClock

from .mixture import Mixing, Mixture
from .replay import CallOfDenoiser, Recording, Replay, dims_beyond, own_part
from .rows import IN_MEMORY, Rows

_STEP = ("model_output", "timestep", "sample")  # of a scheduler's step
_COARSE = 0.05
TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}  # of a sum of outputs, relative; others: _COARSE


class _Watch(ModelHook):
    """On a denoiser: notes its calls."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self.tape = tape

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """What stands in the place of the denoiser's own forward."""
        output = self.fn_ref.original_forward(*args, **kwargs)
        self.tape.note(module, args, bind_forward(module, args, kwargs), output)
        return output


class _Tape:
    """What is seen of one call of the pipeline, for some images."""

    def __init__(
        self, clock: StepClock, kept: Callable[[int], bool], rows: Rows, own: range, family: PipelineFamily
    ) -> None:
        self.clock, self.kept, self.rows, self.own, self.images = clock, kept, rows, own, len(own)
        self.written = 0
        self.several = False  # whether the scheduler has each image more than once
        self.noise: torch.Tensor | None = None  # the state of torch's own generator before the step
        self.calls: list[CallOfDenoiser] = []
        self.place = 0  # of the next call of the denoiser within its step
        self.outputs: list[torch.Tensor] = []
        self.times: list[float] = []
        self.inputs: list[torch.Tensor] = []
        self.scheduler: Any = None
        self.draws: list[list[torch.Tensor]] = []
        self.extra: dict[str, Any] = {}
        self.mixing = Mixing(_conditional(family))
        self.last: torch.Tensor | None = None
        self.rest: list[torch.Tensor | None] = []  # what a denoiser is given behind the latents
        self.reason = ""

    def refuse(self, reason: str) -> None:
        """Note why nothing can be repeated; the first reason stays."""
        self.reason = self.reason or reason

    def note(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """A call of a denoiser."""
        latents, time = latents_argument(named) or "", time_argument(named) or ""
        if not isinstance(named.get(latents), torch.Tensor | list) or named.get(time) is None:
            self.refuse("its denoiser is told no latents or no timestep")
            return
        rest = {k: v for k, v in named.items() if k not in (latents, time)}
        self.inputs.append(latents_of(named).detach())
        told = named[time]
        values = told.flatten().unique().tolist() if isinstance(told, torch.Tensor) else [float(told)]
        if len(values) > 1:
            self.refuse("its timesteps differ within a call")
        if len(self.calls) <= self.place:
            if self.times:
                self.refuse("it calls its denoiser more often at later steps")
            call = CallOfDenoiser(module, args, named, latents, time, 1, arguments=Arguments(rest))
            self.calls.append(call)
        call = self.calls[self.place]
        if module is not call.module or (call.latents, call.time) != (latents, time):
            self.refuse("it has two denoisers")
        elif self.times and (call.arguments is None or not call.arguments.same(rest)):
            self.refuse("its denoiser is told something else at every step")
        call.told.append(float(values[0]))
        self.place += 1
        self.outputs.append(prediction(output).detach())

    def step(self, named: dict[str, Any]) -> None:
        """What the scheduler is given."""
        named = self._once(named)
        x = model_input(self.clock.scheduler, named["sample"], named["timestep"])
        predicted = own_part(named["model_output"], x)
        if predicted is None:
            self.refuse("its scheduler is given something else than its latents")
            predicted = x
        predicted = predicted.detach()
        if not self.times:
            self._begin(named, x)
        elif self.last is not None and not _near(named["sample"], self.last):
            self.refuse("it changes its latents between the scheduler's steps")
        if self.place != len(self.calls) or any(i.shape[0] % x.shape[0] for i in self.inputs):
            self.refuse("its denoiser is not called for all branches of guidance at every step")
        elif not self.reason:
            self._sum(x, predicted)
        self.times.append(float(named["timestep"]))
        self.noise = torch.get_rng_state()
        if self.kept(len(self.times) - 1):
            self._keep(named, x, predicted)
        self.place, self.outputs, self.inputs = 0, [], []

    def _once(self, named: dict[str, Any]) -> dict[str, Any]:
        """The same for each image once, where a scheduler steps with both branches of guidance (DiT)."""
        sample, output = named["sample"], named["model_output"]
        if not self.times:
            first = sample[: self.images]
            several = sample.shape[0] // self.images if sample.shape[0] % self.images == 0 else 1
            self.several = several > 1 and torch.equal(sample, first.repeat(several, *[1] * (sample.dim() - 1)))
        if not self.several:
            return named
        copies = sample.shape[0] // self.images
        sample, output = sample[: self.images], output[: self.images]
        if not torch.equal(named["model_output"], output.repeat(copies, *[1] * (output.dim() - 1))):
            self.refuse("it predicts something else for the branches of guidance")
        return {**named, "sample": sample, "model_output": output}

    def _begin(self, named: dict[str, Any], x: torch.Tensor) -> None:
        for call in self.calls:
            call.images = x.shape[0]
        self.scheduler = copy.deepcopy(self.clock.scheduler)
        self.extra = {k: v for k, v in named.items() if k not in (*_STEP, "generator", "return_dict")}
        if named["model_output"].shape != x.shape:
            self.refuse("its scheduler is given a variance as well")

    def _keep(self, named: dict[str, Any], x: torch.Tensor, predicted: torch.Tensor) -> None:
        generators = named.get("generator")
        if generators is not None:
            several = generators if isinstance(generators, list) else [generators]
            self.draws.append([generator.get_state() for generator in several])
        if len(x) != self.images:
            self.refuse("its scheduler is given other rows than one for each image")
            return
        if not self.rows.steps:
            self.rows.steps = sum(map(self.kept, range(len(self.clock.scheduler.timesteps))))
        self.rows.write(self.written, self.own[0], x, named["sample"], predicted)
        self.written += 1

    def _sum(self, x: torch.Tensor, predicted: torch.Tensor) -> None:
        parts: list[torch.Tensor] = []
        for n, pair in enumerate(zip(self.inputs, self.outputs, strict=True)):
            given, output = (like_latents(value, x) for value in pair)
            branches = given.shape[0] // x.shape[0]
            own, said, dim = own_part(given, x), own_part(output, x), dims_beyond(given, x)
            if own is None or said is None or not _near(own, x.repeat(branches, *[1] * (x.dim() - 1))):
                self.refuse("its denoiser is given other latents than the scheduler's")
                return
            rest = given.narrow(dim, x.shape[dim], given.shape[dim] - x.shape[dim]) if dim and dim > 0 else None
            if not self.times:
                self.rest.append(None if rest is None else rest.clone())
            elif rest is not None and ((first := self.rest[n]) is None or not torch.equal(rest, first)):
                self.refuse("its denoiser is told something else at every step")
            parts += list(said.float().chunk(branches))
        self.mixing.add(parts, predicted.float())

    def after(self, sample: torch.Tensor) -> torch.Tensor:
        """What the scheduler makes of it."""
        if self.noise is not None and not torch.equal(self.noise, torch.get_rng_state()):
            self.refuse("its scheduler draws noise that is not the images' own")
        self.last = (sample[: self.images] if self.several else sample).detach().float().cpu()
        return sample

    def mixture(self, dtype: torch.dtype) -> Mixture:
        """How what the scheduler is given is made of the outputs, the same at every step.

        Sets `reason` if it is not.
        """
        found = None if self.reason else self.mixing.found(TOLERANCE.get(dtype, _COARSE))
        if found is None:
            self.refuse("what it gives its scheduler is not the same sum of predictions at every step")
        return found or Mixture(())


def _near(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two tensors are the same but for rounding."""
    a, b = given.float().cpu(), wanted.float().cpu()
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-3)


def record(
    sampler: Sampler, kept: Callable[[int], bool] = lambda _: True, in_memory: int = IN_MEMORY
) -> tuple[Recording, torch.Tensor]:
    """A run of the pipeline as it is, and the images that it draws, (N, 3, H, W) in 0..1.

    Args:
        sampler: what is drawn.
        kept: by the number of a step, whether its latents and prediction are kept.
        in_memory: bytes of latents and predictions that may be in memory, in float32.

    Raises:
        UnsupportedPipelineError: the pipeline does not step once for every timestep.
    """
    tapes, images, family = [], [], family_of(sampler.pipe)
    parts = list(sampler.chunks())
    rows = Rows(0, parts[-1][1], in_memory)
    for start, end in parts:
        clock = StepClock(sampler.pipe)
        tape = _Tape(clock, kept, rows, range(start, end), family)
        clock.on_step(before=tape.step, after=tape.after)
        hooks = HookSet("diffusion_accel.replay")
        try:
            clock.start([])
            for denoiser in called_denoisers(sampler.pipe):
                hooks.add(denoiser, _Watch(tape))
            images.append(sampler.call(start, end))
        finally:
            hooks.remove()
            clock.stop()
        tapes.append(tape)
    known = [float(t) for t in sampler.pipe.scheduler.timesteps]
    if len(tapes[0].times) != len(known):
        raise UnsupportedPipelineError(
            f"{type(sampler.pipe).__name__} calls its scheduler {len(tapes[0].times)} times for {len(known)} timesteps"
        )
    if not tapes[0].calls:
        raise UnsupportedPipelineError(f"{type(sampler.pipe).__name__} calls no denoiser that is known")
    given = latents_of(tapes[0].calls[0].named)
    if len(called_denoisers(sampler.pipe)) > 1:
        tapes[0].refuse("it has two denoisers")
    if family.views:
        tapes[0].refuse("it denoises an image in views")
    mixtures = [tape.mixture(given.dtype) for tape in tapes]
    reason = next((tape.reason for tape in tapes if tape.reason), "")
    last = [tape.last for tape in tapes if tape.last is not None]
    draws = [[state for tape in tapes for state in tape.draws[i]] for i in range(len(tapes[0].draws))]
    recording = Recording(
        [time for i, time in enumerate(known) if kept(i)],
        known,
        rows.latents,
        rows.predictions,
        rows.samples,
        torch.cat(last),
        tapes[0].scheduler,
        tapes[0].extra,
        draws,
        [] if reason else [(tape.calls, mixture) for tape, mixture in zip(tapes, mixtures, strict=True)],
        reason,
        given.device,
        channelwise(tapes[0].calls[0].module, last[0]),
        None if reason else _branches(sampler.pipe, [tape.calls for tape in tapes]),
        family.negated,
    )
    return (recording if reason else _checked(recording, given.dtype)), torch.cat(images)


def _conditional(family: PipelineFamily) -> int | None:
    """The number of the conditional one of two outputs; None if it is not known."""
    if family.calls:
        return 0
    return None if family.branches is None else int(not family.branches.conditional_first)


def _branches(pipe: Any, tapes: list[list[CallOfDenoiser]]) -> tuple[int, int] | None:
    """Which outputs of the denoiser at a step are the unconditional and the conditional one; None: not just these, or
    there is no guidance in any of the calls."""
    family, guided = family_of(pipe), [calls for calls in tapes if sum(call.branches for call in calls) != 1]
    if not guided or no_branches(pipe) is not None:
        return None
    conditional, each = _conditional(family), 2 if family.calls else 1
    if conditional is None or any(len(calls) != each or sum(c.branches for c in calls) != 2 for calls in guided):
        return None
    return (1 - conditional, conditional)


def channelwise(denoiser: nn.Module, latents: torch.Tensor) -> bool:
    """Whether the channels of latents are where `combination.channel_dim` has them.

    They are not in videos whose frames come first, (B, F, C, H, W), nor in sound, (B, C, L).
    """
    config = getattr(denoiser, "config", {})
    known = {config.get("in_channels"), config.get("out_channels")}
    own = channel_dim(latents)
    if latents.dim() in (3, 5):
        other = 1 if latents.dim() == 3 else 2
        return latents.shape[own] in known and latents.shape[other] not in known
    return latents.dim() == 4


def _checked(recording: Recording, dtype: torch.dtype) -> Recording:
    """With a reason if predictions that are repeated, for some of the images each time, are not those recorded."""
    replay, total = Replay(recording), len(recording)
    for step, part in ((total // 2, slice(0, None, 2)), ((total - 1) * 3 // 4, slice(1, None, 2))):
        which = list(range(recording.images))[part]
        if not which:
            continue
        again = replay(recording.latents[step][which].float(), recording.times[step], which)
        off = _distance(again, recording.predictions[step][which].float())
        if off > TOLERANCE.get(dtype, _COARSE) and off > min(_COARSE, 4 * _rounding(replay, step)):
            return replace(recording, tapes=[], reason="its denoiser does not say the same when it is asked again")
    return recording


def _rounding(replay: Replay, step: int) -> float:
    """How far predictions for one image alone are from those for it beside copies of itself, which is what arithmetic
    makes of another number of rows: next to nothing in float32, much where layers compute in bfloat16."""
    recording = replay.recording
    latents, time, copies = recording.latents[step][:1].float(), recording.times[step], [0] * recording.images
    alone, beside = replay(latents, time, [0]), replay(latents[copies], time, copies)
    return _distance(beside, alone.expand_as(beside))


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest of any image, as a part of what is wanted."""
    mean_square = [values.detach().flatten(1).pow(2).mean(1) for values in (found - wanted, wanted)]
    return float((mean_square[0] / mean_square[1].clamp(min=1e-30)).max().sqrt())
