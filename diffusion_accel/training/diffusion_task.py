"""The task of training a denoiser: any of three model kinds, three predictions, and the training accelerators."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from diffusion_accel.denoisers import class_tables
from diffusion_accel.routing.hooks import CONFIG_KEY, Recipe, route

from .clusters import Interval, draw_clustered
from .denoising import TIMESTEPS, Process, draw_timesteps
from .files import UsageError
from .images import save_grid
from .multitask import Weighting, weighting
from .noise import NoiseChoice
from .sampling import sample
from .task import Batch

PREVIEWS = 24  # images in a preview


class Examples(Protocol):
    """The images to train on, as tensors in the space of the denoiser, and what they are conditioned on.

    Attributes:
        train, heldout: indices of the images of either part; one that is to be drawn more often occurs several times.
        watched: those of the trained ones that evaluations and previews look at.
        variants: conditions an image has (captions); 1 if there is nothing to choose.
    """

    train: np.ndarray
    watched: np.ndarray
    heldout: np.ndarray
    variants: int

    def clean(self, indices: torch.Tensor) -> torch.Tensor:
        """float32 (N, C, h, w)."""

    def condition(self, indices: torch.Tensor, variants: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor | None:
        """Token ids (N, tokens) or class labels (N,), the empty condition where `dropped`; None: unconditional."""

    def decode(self, clean: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in -1..1, for previews."""


class Denoiser(nn.Module):
    """A denoiser with, if it has captions, the text encoder that trains with it: one call for every model kind.

    The parts are called as in diffusers' pipelines: `text`, and `unet` or `transformer`.
    """

    def __init__(self, model: nn.Module, text: nn.Module | None = None) -> None:
        super().__init__()
        self.part = "unet" if "UNet" in type(model).__name__ else "transformer"
        self.text = text
        memory_format = torch.channels_last if self.part == "unet" else torch.contiguous_format
        in_place: Any = model  # torch's types do not know the keyword
        self.add_module(self.part, in_place.to(memory_format=memory_format))

    @property
    def core(self) -> Any:
        """The denoiser itself, without its text encoder."""
        return getattr(self, self.part)

    def train(self, mode: bool = True) -> Denoiser:
        """As every module; embeddings of classes never drop labels by themselves."""
        super().train(mode)
        for table in class_tables(self):  # conditions are dropped by the task, from its own generator
            table.eval()
        return self

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """Noisy samples (N, C, h, w), the model's timesteps (N,) and condition -> prediction (N, C, h, w)."""
        if self.part == "unet":
            x = x.contiguous(memory_format=torch.channels_last)
        given: dict[str, Any] = {}
        if self.text is not None:
            given["encoder_hidden_states"] = self.text(input_ids=condition).last_hidden_state
        elif condition is not None:
            given["class_labels"] = condition
        return self.core(x, timesteps, **given, return_dict=False)[0]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised.

    Attributes:
        process: noising and prediction.
        dropout: share of empty conditions, for classifier-free guidance (Ho and Salimans 2022).
        noise: which noise goes with which image.
        intervals: task clusters; empty: timesteps come from `uniform` and `t_mean` instead.
        task_loss: how the clusters' losses become one update, see `multitask`.
        min_snr: gamma of Min-SNR loss weights; None: all timesteps count the same.
        uniform, t_mean: of `draw_timesteps`; the default is uniform.
    """

    process: Process = field(default_factory=Process)
    dropout: float = 0.1
    noise: NoiseChoice = field(default_factory=NoiseChoice)
    intervals: tuple[Interval, ...] = ()
    task_loss: str = "none"
    min_snr: float | None = None
    uniform: float = 1.0
    t_mean: float = 0.0

    def __post_init__(self) -> None:
        if self.task_loss != "none" and not self.intervals:
            raise UsageError(f"the task loss {self.task_loss!r} needs task clusters")
        weighting(self.task_loss, max(1, len(self.intervals)))
        if self.min_snr is not None:
            self.process.min_snr(self.min_snr)


def sample_of(indices: np.ndarray, size: int, seed: int) -> np.ndarray:
    """A fixed random sample of the indices, for evaluation."""
    return indices[np.random.default_rng(seed).permutation(len(indices))[:size]]


class DenoisingTask:
    """Trains a `Denoiser` on `Examples` by the mean square error of its prediction, with routed channels or without."""

    def __init__(
        self, denoiser: Denoiser, examples: Examples, objective: Objective, routing: Recipe | None = None
    ) -> None:
        self.model, self.examples, self.objective = denoiser, examples, objective
        if routing is not None:
            route(denoiser.core, routing)
            denoiser.core.register_to_config(**{CONFIG_KEY: routing.to_dict()})
        self.scale = objective.noise.scale
        self.facts = {"task_routing": None if routing is None else routing.to_dict(), "image_scale": self.scale}
        self.weighting: Weighting | None = None
        if objective.intervals:
            self.weighting = weighting(objective.task_loss, len(objective.intervals))
        self._weights = None if objective.min_snr is None else objective.process.min_snr(objective.min_snr)

    # ------------------------------------------------------------------ training
    def clean(self, indices: torch.Tensor) -> torch.Tensor:
        """The samples as they are noised, and as the model draws them: (N, C, h, w), `scale` times what they are."""
        clean = self.examples.clean(indices)
        return clean if self.scale == 1 else clean * self.scale

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """Which images, conditions, timesteps and noise seeds: small tensors; `loss` makes the rest of a slice."""
        objective, batch = self.objective, {}
        if objective.intervals:
            batch["timesteps"], batch["clusters"] = draw_clustered(rng, size, list(objective.intervals))
        else:
            batch["timesteps"] = draw_timesteps(rng, size, objective.uniform, objective.t_mean)
        return batch | {
            "index": torch.from_numpy(rng.choice(self.examples.train, size)),
            "variant": torch.from_numpy(rng.integers(0, self.examples.variants, size)),
            "dropped": torch.from_numpy(rng.random(size) < objective.dropout),
            "seed": torch.from_numpy(rng.integers(0, 2**62, size)),
        }

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The mean error of a slice; with task clusters the mean of each, (k,)."""
        error = self.errors(model, batch)
        if self.weighting is None:
            return error.mean()
        k = len(self.objective.intervals)
        if len(error) % k:
            raise UsageError(f"the {len(error)} samples of a micro-batch cannot be divided among {k} task clusters")
        sums = torch.zeros(k, device=error.device).index_add(0, batch["clusters"], error)
        return sums * (k / len(error))

    def errors(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of every sample of a slice, (N,)."""
        process, device = self.objective.process, batch["timesteps"].device
        index, timesteps = batch["index"].cpu(), batch["timesteps"]
        x = self.clean(index).to(device)
        condition = self.examples.condition(index, batch["variant"].cpu(), batch["dropped"].cpu())
        noise = self.objective.noise.noise_for(x, batch["seed"])
        noisy, target = process.noisy(x, noise, timesteps)
        given = None if condition is None else condition.to(device)
        predicted = model(noisy, process.model_timesteps(timesteps), given).float()
        error = ((predicted - target) ** 2).flatten(1).mean(1)
        return error if self._weights is None else error * self._weights.to(device)[timesteps]

    # ------------------------------------------------------------------ watching
    def evaluate(self) -> dict[str, Any]:
        """`prediction_error` of up to 128 trained and 128 held-out images, as "error_train" and "error_heldout"."""
        result = {}
        for name, indices in (("error_train", self.examples.watched), ("error_heldout", self.examples.heldout)):
            chosen = sample_of(indices, 128, seed=3)
            if len(chosen):
                clean, condition = self._fixed(chosen)
                result[name] = prediction_error(self.model, clean, condition, self.objective.process)
        return result

    def _fixed(self, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        index, zeros = torch.from_numpy(chosen), torch.zeros(len(chosen), dtype=torch.int64)
        return self.clean(index), self.examples.condition(index, zeros, zeros.bool())

    def preview(self, path: Path) -> None:
        """Samples of up to 18 trained and, at the end, 6 held-out conditions."""
        heldout = sample_of(self.examples.heldout, PREVIEWS // 4, seed=2)
        chosen = np.concatenate([sample_of(self.examples.watched, PREVIEWS - len(heldout), seed=2), heldout])
        clean, condition = self._fixed(chosen)
        empty = self.empty(len(chosen))
        made = sample(self.model, self.objective.process, tuple(clean.shape), condition, empty, guidance=3.0)
        save_grid(self.examples.decode(made / self.scale), 6, path)

    def empty(self, count: int) -> torch.Tensor | None:
        """The empty condition, `count` times; None if conditions were never dropped."""
        if not self.objective.dropout:
            return None
        index = torch.from_numpy(self.examples.train[:1]).repeat(count)
        return self.examples.condition(index, torch.zeros_like(index), torch.ones(count, dtype=torch.bool))


@torch.no_grad()
def prediction_error(
    denoiser: nn.Module,
    clean: torch.Tensor,
    condition: torch.Tensor | None,
    process: Process,
    bins: int = 4,
    seed: int = 7,
) -> dict[str, Any]:
    """Mean square error of the prediction by noise level: {"bins": [...], "mean": ...}.

    The timesteps of the N samples are spread evenly over 0..999, in order; a bin is a part of the samples, so with four
    of them the first is t < 250. For v-prediction 1.0 is about the error of predicting zero.
    """
    n, device = len(clean), next(denoiser.parameters()).device
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    timesteps = ((torch.arange(n) + 0.5) / n * TIMESTEPS).long()
    noisy, target = process.noisy(clean, noise, timesteps)
    errors = []
    for part in torch.arange(n).split(32):
        given = None if condition is None else condition[part].to(device)
        predicted = denoiser(noisy[part].to(device), process.model_timesteps(timesteps[part]).to(device), given)
        errors.append(((predicted.float().cpu() - target[part]) ** 2).flatten(1).mean(1))
    error = torch.cat(errors)
    parts = [round(float(part.mean()), 4) for part in error[: n // bins * bins].view(bins, -1)] if n >= bins else []
    return {"bins": parts, "mean": round(float(error.mean()), 4)}
