"""Selective finetuning: the layers that suffer most learn, with the rest of the quantized model around them fixed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusion_accel.denoisers import FEED_FORWARD, QUERIES, SAMPLE_KEYS_VALUES, SELF_KEYS_VALUES
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.spec import ROWS_LIMIT, STEPS_LIMIT, within

from .calibration import CalibrationSet, Rows
from .trainable_layer import Draft, rounding

MOMENTS = ("visit", "timestep", "shared")
# which layers are finetuned, by model, as published; a model's family names one (denoisers.quantization_preset)
PRESETS: dict[str, tuple[str, ...]] = {
    "sd": (FEED_FORWARD,),
    "sdxl": (FEED_FORWARD, QUERIES),
    "lsun": (QUERIES, SAMPLE_KEYS_VALUES),
    "dit": (FEED_FORWARD, QUERIES, SELF_KEYS_VALUES),
}


@dataclass(frozen=True)
class FinetuneSettings:
    """QuEST's two stages; the defaults are those of its published code for Stable Diffusion.

    Attributes:
        time_epochs: stage 1, epochs over the rows of each timestep; the first timestep, those above 300, the others.
        time_rows: stage 1, rows of each timestep in an epoch.
        epochs: stage 2, epochs over all timesteps.
        rows: stage 2, rows of each timestep in an epoch.
        batch: rows in a step; the published code takes one every 4 rows.
        moments: Adam's moments of the scales: "visit", begun anew whenever a timestep is visited, as published;
            "timestep", kept for each; "shared", one of all timesteps, which goes on moving the scales of those that
            have no rows in a step.
        rate: learning rate of weights and biases.
        scale_rate: of the scales of activations, as a share of their size (published: 1e-4 absolute in stage 2,
            which is this share for scales around 0.1).
        layer_loss: also compare the outputs of the finetuned layers.
    """

    time_epochs: tuple[int, int, int] = (200, 50, 400)
    time_rows: int = 8
    epochs: int = 20
    rows: int = 64
    batch: int = 4
    moments: str = "visit"
    rate: float = 1e-5
    scale_rate: float = 1e-3
    layer_loss: bool = True

    def __post_init__(self) -> None:
        if self.moments not in MOMENTS:
            raise ConfigurationError(f"moments must be one of {', '.join(MOMENTS)}, got {self.moments!r}")
        for name in ("time_epochs", "epochs"):
            within(getattr(self, name), 0, STEPS_LIMIT, name.replace("_", " "))
        for name in ("time_rows", "rows", "batch"):
            within(getattr(self, name), 1, ROWS_LIMIT, name.replace("_", " "))
        for name in ("rate", "scale_rate"):
            within(getattr(self, name), math.ulp(0), 1.0, name.replace("_", " "))


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that one of the patterns matches whole."""
    found = [re.compile(p) for p in patterns]
    return [n for n in names if any(p.fullmatch(n) for p in found)]


def stage_one_epochs(settings: FinetuneSettings, number: int, timestep: float) -> int:
    """Epochs of stage 1 at one timestep."""
    first, early, late = settings.time_epochs
    return first if number == 0 else early if timestep > 300 else late


class Tuner:
    """Finetunes some layers of a model of drafts; one instance for each stage, so that Adam's moments are kept.

    A timestep is one bucket of the activation grids. Only its own scales learn from its rows.

    Args:
        chosen: the layers whose weights and biases learn.
        scales: the layers whose activation scales learn.
        moments: of the scales, see `FinetuneSettings`.
    """

    def __init__(
        self,
        model: nn.Module,
        drafts: dict[str, Draft],
        chosen: list[str],
        scales: list[str],
        rate: float,
        scale_rate: float,
        layer_loss: bool,
        moments: str = "visit",
    ) -> None:
        self.model, self.drafts, self.chosen, self.layer_loss = model, drafts, chosen, layer_loss
        self.moments = moments
        self.weights = [p for n in chosen for p in drafts[n].own()]
        self.scales = [p for n in scales for p in _scales(drafts[n])]
        self.floors = [float(p.detach().min()) / 4 for p in self.scales]  # a scale stays positive
        self.rates = [scale_rate * float(p.detach().mean()) for p in self.scales]
        self.rate, self.share = rate, 1.0
        for p in (*self.weights, *self.scales):
            p.requires_grad_(True)
        self._weights = torch.optim.Adam([{"params": self.weights, "lr": rate}]) if self.weights else None
        self._scales: dict[int, torch.optim.Adam] = {}
        self._number = 0

    def visit(self, number: int) -> None:
        """Learn from rows of bucket `number` from now on."""
        self._number = number
        if self.moments == "visit":
            self._scales.clear()

    def step(self, rows: Rows) -> float:
        """One step of Adam on some rows of the bucket; returns the loss."""
        heard: dict[str, torch.Tensor] = {}
        wanted: dict[str, torch.Tensor] = {}
        if self.layer_loss:
            with torch.no_grad(), self._listening(wanted):
                rounding(self.drafts, False, False)
                rows.run(self.model)
        rounding(self.drafts, True, True)
        for p in (*self.weights, *self.scales):
            p.grad = None
        with torch.enable_grad(), self._listening(heard):
            loss = (rows.run(self.model) - rows.output).square().mean() * max(1, len(wanted))
            for name, target in wanted.items():
                loss = loss + (heard[name] - target).square().mean()
            loss.backward()
        if self._weights is not None:
            self._weights.param_groups[0]["lr"] = self.share * self.rate
            self._weights.step()
        self._step_scales()
        return float(loss.detach())

    def _step_scales(self) -> None:
        optimizer = self._scale_optimizer()
        for group, scale, rate in zip(optimizer.param_groups, self.scales, self.rates, strict=True):
            group["lr"] = self.share * rate
            (own,) = group["params"]
            own.grad = scale.grad if self.moments == "shared" or scale.grad is None else scale.grad[self._number]
        optimizer.step()
        with torch.no_grad():
            for scale, floor in zip(self.scales, self.floors, strict=True):
                scale.clamp_(min=floor)

    def _scale_optimizer(self) -> torch.optim.Adam:
        """Adam over the scales of the bucket, which are rows of the drafts' own tensors; shared: over all of them."""
        key = 0 if self.moments == "shared" else self._number
        if key not in self._scales:
            own = self.scales if self.moments == "shared" else [nn.Parameter(p.data[key]) for p in self.scales]
            self._scales[key] = torch.optim.Adam([{"params": [p]} for p in own] or [{"params": []}])
        return self._scales[key]

    def pace(self, share: float) -> None:
        """Learn at this share of the rates from now on."""
        self.share = share

    def close(self) -> None:
        """Nothing learns any more."""
        for p in (*self.weights, *self.scales):
            p.requires_grad_(False)
            p.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """What a stage that goes on between two buckets needs, besides the drafts."""
        found = {
            "rates": torch.tensor(self.rates, dtype=torch.float64),
            "floors": torch.tensor(self.floors, dtype=torch.float64),
        }
        kept = {} if self.moments == "visit" else self._scales
        for name, optimizer in (("weights", self._weights), *((f"scales{k}", v) for k, v in kept.items())):
            for i, values in enumerate(_states(optimizer)):
                found |= {f"{name}/{i}/{k}": torch.as_tensor(v).contiguous() for k, v in values.items()}
        return found

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state`. Rates and floors are those of the beginning of the stage."""
        self.rates, self.floors = state["rates"].tolist(), state["floors"].tolist()
        numbers = {int(key.partition("/")[0][6:]) for key in state if key.startswith("scales")}
        for number in numbers:
            self._number = number
            _set_states(self._scale_optimizer(), f"scales{number}", state)
        if self._weights is not None:
            _set_states(self._weights, "weights", state)

    @contextmanager
    def _listening(self, into: dict[str, torch.Tensor]) -> Iterator[None]:
        """Collect the outputs of the chosen layers, where the loss wants them."""

        def note(name: str) -> Callable[..., None]:
            return lambda module, args, output: into.__setitem__(name, output)

        names = self.chosen if self.layer_loss else []
        handles = [self.drafts[n].register_forward_hook(note(n)) for n in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _states(optimizer: torch.optim.Optimizer | None) -> list[dict[str, Any]]:
    groups = optimizer.param_groups if optimizer is not None else []
    return [optimizer.state.get(p, {}) for group in groups for p in group["params"]]  # type: ignore[union-attr]


def _set_states(optimizer: torch.optim.Optimizer, name: str, state: dict[str, torch.Tensor]) -> None:
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        own = {k.rpartition("/")[2]: v for k, v in state.items() if k.startswith(f"{name}/{i}/")}
        if own:
            optimizer.state[p] = own


def _scales(draft: Draft) -> list[nn.Parameter]:
    return [getattr(draft, f"{n}_scale") for n in ("input", "output") if hasattr(draft, f"{n}_scale")]


def batches(calibration: CalibrationSet, number: int, rows: int, size: int, seed: int) -> Iterable[Rows]:
    """`rows` rows of a bucket, `size` at a time; `seed` decides which ones and their order."""
    picked = calibration.sample(number, rows, seed)
    order = torch.randperm(len(picked), generator=torch.Generator().manual_seed(seed))
    for start in range(0, len(order), size):
        yield picked.pick(order[start : start + size])


@torch.no_grad()
def relative_error(model: nn.Module, parts: Iterable[Rows]) -> float:
    """Squared error of the model's answers over the squared answers of full precision, over all rows."""
    wrong = size = 0.0
    for rows in parts:
        wrong += float((rows.run(model) - rows.output).square().sum())
        size += float(rows.output.square().sum())
    return wrong / max(size, 1e-30)
