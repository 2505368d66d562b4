"""The denoiser of a pipeline without the pipeline: what guidance makes of it at any latents and timestep.

What was recorded of one call (`recording`) is repeated for other latents and timesteps, for some of the images only,
and from the middle of a trajectory: no text is encoded again, nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from diffusion_accel.denoisers import latents_of, like_latents, lists_samples, prediction
from diffusion_accel.errors import UnsupportedPipelineError
from diffusion_accel.hooks import as_given, map_tensors
from diffusion_accel.reuse.call_arguments import Arguments
from diffusion_accel.reuse.rows import NOT_ROWS

from .mixture import Mixture


def own_part(value: torch.Tensor, latents: torch.Tensor) -> torch.Tensor | None:
    """The part of what a denoiser is given, or returns, that is about the latents; None if there is none.

    Behind it may be other channels (a mask, a learned variance) or other tokens (a reference image).
    """
    longer = dims_beyond(value, latents)
    if longer is None:
        return None
    return value if longer < 0 else value.narrow(longer, 0, latents.shape[longer])


def dims_beyond(value: torch.Tensor, latents: torch.Tensor) -> int | None:
    """The dimension in which a tensor goes on behind the latents: -1: in none; None: it is of another shape."""
    if value.dim() != latents.dim():
        return None
    differ = [d for d in range(1, value.dim()) if value.shape[d] != latents.shape[d]]
    if not differ:
        return -1
    return differ[0] if len(differ) == 1 and value.shape[differ[0]] > latents.shape[differ[0]] else None


@dataclass
class CallOfDenoiser:
    """One call of a denoiser within a step.

    Attributes:
        module: what was called, and `args`: how many arguments were not named.
        named: its arguments at the first step.
        latents: the name of the latents among them, and `time` that of the timestep.
        rows: of its batch.
        images: for how many images; a row for each, once for each branch.
        told: what it was told as the timestep, step by step.
        arguments: to compare those of later steps with.
    """

    module: nn.Module
    args: tuple[Any, ...]
    named: dict[str, Any]
    latents: str
    time: str
    images: int
    told: list[float] = field(default_factory=list)
    arguments: Arguments | None = None

    @property
    def rows(self) -> int:
        """Rows of its batch."""
        return len(self.named[self.latents])

    @property
    def branches(self) -> int:
        """How many rows an image has."""
        return self.rows // self.images

    def outputs(
        self, x: torch.Tensor, told: float, which: Sequence[int], only: int | None = None
    ) -> list[torch.Tensor]:
        """What it returns for other latents of some of its images, a tensor for each branch, or for one `only`."""
        branches = range(self.branches) if only is None else [only]
        rows = [branch * self.images + i for branch in branches for i in which]
        chosen, listed = torch.tensor(rows, device=x.device), lists_samples(self.named)

        def some(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.dim() or not tensor.shape[0] or tensor.shape[0] % self.rows:
                return tensor
            return tensor.unflatten(0, (self.rows, -1)).index_select(0, chosen).flatten(0, 1)  # of each frame, too

        def of_rows(name: str, value: Any) -> Any:
            if listed and isinstance(value, list) and len(value) == self.rows:
                return [value[row] for row in rows]
            return value if name in NOT_ROWS else map_tensors(some, value)

        named, whole = {k: of_rows(k, v) for k, v in self.named.items()}, latents_of(self.named)
        given = like_latents(whole, x)
        latents = x.repeat(len(branches), *[1] * (x.dim() - 1)).to(given.dtype)
        dim = dims_beyond(given, x)
        if dim is not None and dim > 0:  # inpainting: a mask and masked latents behind them
            own = x.shape[dim]
            rest = named[self.latents].narrow(dim, own, given.shape[dim] - own)
            latents = torch.cat([latents, rest], dim)
        batch: Any = list(latents.reshape(-1, *whole.shape[1:]).unbind()) if listed else latents
        named |= {self.latents: batch, self.time: self._time(named[self.time], told)}
        args, keywords = as_given(self.module, self.args, named)
        output = own_part(like_latents(prediction(self.module(*args, **keywords)), x), x)
        assert output is not None  # it was when it was recorded
        return list(output.float().chunk(len(branches)))

    def _time(self, like: Any, told: float) -> Any:
        if not isinstance(like, torch.Tensor):
            return type(like)(told)
        whole = not like.dtype.is_floating_point
        return torch.full_like(like, round(told) if whole else told)


@dataclass(frozen=True)
class Recording:
    """A run of the baseline.

    Attributes:
        times: the scheduler's timesteps at the steps that were kept, (S,).
        all_times: those at all steps.
        latents: at the steps that were kept, as the denoiser sees them, (S, N, C, …), float32 on the CPU; float16, in
            a file, if there is much of it (`rows`); so the next two.
        predictions: what the scheduler was given, (S, N, C, …).
        samples: the latents as the scheduler has them; `latents` itself where both are the same.
        result: what it made in the end, (N, C, …).
        scheduler: a copy from before its first step.
        extra: what its step is given beside prediction, timestep, sample and generator.
        draws: the states of the images' generators before each step; empty if it is given none.
        tapes: a part of the images each, with what guidance makes of their outputs; empty if `reason` is not.
        reason: why the denoiser cannot be called without the pipeline; empty if it can.
        channelwise: whether the channels of the latents are where `combination.channel_dim` has them.
        negated: whether the scheduler is given the opposite of what the denoiser says.
        branches: the numbers of the unconditional and the conditional output of the denoiser among those of a step,
            where there is guidance; None if there is none with just these two.
    """

    times: list[float]
    all_times: list[float]
    latents: torch.Tensor
    predictions: torch.Tensor
    samples: torch.Tensor
    result: torch.Tensor
    scheduler: Any
    extra: dict[str, Any]
    draws: list[list[torch.Tensor]]
    tapes: list[tuple[list[CallOfDenoiser], Mixture]]
    reason: str
    device: torch.device
    channelwise: bool = True
    branches: tuple[int, int] | None = None
    negated: bool = False

    def __len__(self) -> int:
        return len(self.times)

    @property
    def draws_noise(self) -> bool:
        """Whether the scheduler's steps draw noise."""
        return (
            any(not torch.equal(a, b) for a, b in zip(*self.draws[:2], strict=True)) if len(self.draws) > 1 else False
        )

    @property
    def images(self) -> int:
        """How many images."""
        return int(self.latents.shape[1])


class Said(NamedTuple):
    """What a scheduler would be given, and what of it is guidance's: each (N, C, …), float32 on the CPU.

    Attributes:
        prediction: after guidance.
        addition: what guidance adds, so `prediction` minus the conditional one; None where there are no two branches.
        difference: the unconditional minus the conditional output of the denoiser; None likewise.
    """

    prediction: torch.Tensor
    addition: torch.Tensor | None = None
    difference: torch.Tensor | None = None


class Replay:
    """The denoiser with guidance, for the images of a recording; counts its calls.

    Attributes:
        evaluations: of an image at a timestep, so far; with one of two branches it counts half.
    """

    def __init__(self, recording: Recording) -> None:
        if recording.reason:
            raise UnsupportedPipelineError(recording.reason)
        self.recording, self.evaluations = recording, 0.0

    def __call__(self, x: torch.Tensor, time: float, which: Sequence[int]) -> torch.Tensor:
        """What the scheduler would be given: (len(which), C, …), float32 on the CPU.

        Args:
            x: latents as the denoiser sees them, of the images `which`, in this order.
            time: in the scheduler's unit; between its timesteps, what the denoiser is told is interpolated.
            which: numbers of images, increasing.
        """
        return self._asked(x, time, which, None, None).prediction

    def apart(self, x: torch.Tensor, time: float, which: Sequence[int], difference: torch.Tensor | None = None) -> Said:
        """The same, and what guidance adds, where there are two branches.

        With a `difference` of them, (len(which), C, …), only the conditional one is computed, and the other one is it
        with this difference.
        """
        return self._asked(x, time, which, self.recording.branches, difference)

    def _asked(
        self,
        x: torch.Tensor,
        time: float,
        which: Sequence[int],
        two: tuple[int, int] | None,
        known: torch.Tensor | None,
    ) -> Said:
        parts: list[tuple[torch.Tensor, ...]] = []
        first, done, self.evaluations = 0, 0, self.evaluations + len(which) * (1.0 if known is None else 0.5)
        if not which:
            return Said(x.clone()) if two is None else Said(x.clone(), x.clone(), x.clone())
        given = x.to(self.recording.device)
        for calls, mixture in self.recording.tapes:
            images = calls[0].images
            here = [i - first for i in which if first <= i < first + images]
            first += images
            if not here:
                continue
            own, lacking = given[done : done + len(here)], None if known is None else known[done : done + len(here)]
            outputs = self._outputs(calls, own, time, here, two, lacking)
            said = mixture(outputs)
            if two is None:
                parts.append((said,))
            else:
                unconditional, conditional = (outputs[n if len(outputs) > 1 else 0] for n in two)
                adding = said + (conditional if self.recording.negated else -conditional)
                parts.append((said, adding, unconditional - conditional))
            done += len(here)
        together = torch.stack([torch.cat(kind) for kind in zip(*parts, strict=True)])
        return Said(*together.cpu())  # the device is waited for once

    def _outputs(
        self,
        calls: Sequence[CallOfDenoiser],
        x: torch.Tensor,
        time: float,
        which: Sequence[int],
        two: tuple[int, int] | None,
        lacking: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """What the calls return; with what is `lacking` to the conditional branch only that one is computed."""
        places = [(call, branch) for call in calls for branch in range(call.branches)]
        if two is None or lacking is None or len(places) == 1:
            return [o for call in calls for o in call.outputs(x, self._told(call, time), which)]
        call, branch = places[two[1]]
        (conditional,) = call.outputs(x, self._told(call, time), which, branch)
        outputs = [conditional, conditional]
        outputs[two[0]] = conditional + lacking.to(conditional.device)
        return outputs

    def _told(self, call: CallOfDenoiser, time: float) -> float:
        times, told = np.array(self.recording.all_times), np.array(call.told)
        order = np.argsort(times, kind="stable")
        times, told = times[order], told[order]
        if time < times[0] or time > times[-1]:  # beyond its ends, along the line through them
            slope = (told[-1] - told[0]) / max(1e-12, times[-1] - times[0])
            return float(told[0] + slope * (time - times[0]))
        return float(np.interp(time, times, told))
