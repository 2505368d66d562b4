"""Selective finetuning: the layers that suffer most learn, with the rest of the quantized model around them fixed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .calibration import CalibrationSet, Rows
from .draft import Draft, rounding

# names of layers by what they do, in diffusers' models
TIME_LAYERS = r".*(time_emb_proj|time_embedding\.linear_[12]|timestep_embedder\.linear_[12]|norm1(_context)?\.linear)"
FEED_FORWARD = r".*ff(_context)?\.net\..*"
QUERIES = r".*\.(to_q|add_q_proj)"
SELF_KEYS_VALUES = r".*attn1?\.(to_k|to_v)"
PRESETS: dict[str, tuple[str, ...]] = {
    "sd": (FEED_FORWARD,),
    "sdxl": (FEED_FORWARD, QUERIES),
    "lsun": (QUERIES, r".*\.(to_k|to_v)"),
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
        batch: rows in a step.
        rate: learning rate of weights and biases.
        scale_rate: of the scales of activations, as a share of their size (published: 1e-4 absolute in stage 2,
            which is this share for scales around 0.1).
        layer_loss: also compare the outputs of the finetuned layers.
    """

    time_epochs: tuple[int, int, int] = (200, 50, 400)
    time_rows: int = 8
    epochs: int = 20
    rows: int = 64
    batch: int = 32
    rate: float = 1e-5
    scale_rate: float = 1e-3
    layer_loss: bool = True


def preset_for(model: nn.Module) -> str:
    """The paper's choice of layers that fits the kind of a model."""
    name = type(model).__name__
    if "Transformer" in name:
        return "dit"
    if name == "UNet2DModel":
        return "lsun"
    return "sdxl" if getattr(getattr(model, "config", None), "addition_embed_type", None) == "text_time" else "sd"


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

    Args:
        chosen: the layers whose weights and biases learn.
        scales: the layers whose activation scales learn.
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
    ) -> None:
        self.model, self.drafts, self.chosen, self.layer_loss = model, drafts, chosen, layer_loss
        weights = [p for n in chosen for p in drafts[n].own()]
        steps = [p for n in scales for p in _scales(drafts[n])]
        self.parameters = [*weights, *steps]
        self.floors = [(p, float(p.detach().min()) / 4) for p in steps]  # a scale stays positive
        for p in self.parameters:
            p.requires_grad_(True)
        groups: list[dict[str, Any]] = [{"params": weights, "lr": rate}] if weights else []
        groups += [{"params": [p], "lr": scale_rate * float(p.detach().mean())} for p in steps]
        self.optimizer = torch.optim.Adam(groups)
        self.rates = [group["lr"] for group in groups]

    def step(self, rows: Rows) -> float:
        """One step of Adam on some rows; returns the loss."""
        heard: dict[str, torch.Tensor] = {}
        wanted: dict[str, torch.Tensor] = {}
        if self.layer_loss:
            with torch.no_grad(), self._listening(wanted):
                rounding(self.drafts, False, False)
                rows.run(self.model)
        rounding(self.drafts, True, True)
        with torch.enable_grad(), self._listening(heard):
            loss = (rows.run(self.model) - rows.output).square().mean() * max(1, len(wanted))
            for name, target in wanted.items():
                loss = loss + (heard[name] - target).square().mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for parameter, floor in self.floors:
                parameter.clamp_(min=floor)
        return float(loss.detach())

    def pace(self, share: float) -> None:
        """Learn at this share of the rates from now on."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = share * rate

    def close(self) -> None:
        """Nothing learns any more."""
        for p in self.parameters:
            p.requires_grad_(False)
            p.grad = None

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
