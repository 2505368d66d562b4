"""What one training step of a denoiser needs: the noise schedule, its targets, timesteps and loss weights."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from diffusion_accel.prediction import converted

from .files import UsageError

TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02
PREDICTIONS = ("epsilon", "v_prediction", "flow")
SCHEDULES = ("linear", "scaled_linear", "cosine")


@functools.cache  # read at every training step
def alphas_cumprod(schedule: str = "linear") -> torch.Tensor:
    """Cumulative product of 1 - beta over the `TIMESTEPS`, float32 (1000,).

    "linear": the betas of DDPM (Ho et al. 2020, section 4). The last value is 4e-5: next to no signal is left at
    t = 999. "scaled_linear": those of Stable Diffusion, which end at 4.7e-3; on small latents that still shows the mean
    colour. "cosine": Nichol and Dhariwal 2021, equation 17, as diffusers' `squaredcos_cap_v2`. In double precision to
    the end: diffusers' schedulers multiply in single precision, whose last digits runs that were begun before do not
    have.
    """
    if schedule == "linear":
        betas = np.linspace(BETA_START, BETA_END, TIMESTEPS)
    elif schedule == "scaled_linear":
        betas = np.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS) ** 2
    elif schedule == "cosine":
        at = np.cos((np.arange(TIMESTEPS + 1) / TIMESTEPS + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - at[1:] / at[:-1], 0.999)
    else:
        raise UsageError(f"unknown noise schedule {schedule!r}; the schedules are: {', '.join(SCHEDULES)}")
    return torch.from_numpy(np.cumprod(1 - betas)).float()


@dataclass(frozen=True)
class Process:
    """A noising process, x_t = signal(t) * x + noise(t) * eps, and what the model predicts of it.

    `t` is always an index, 0 ... 999, from little noise to much; `model_timesteps` gives what the model is told.

    Attributes:
        prediction: "epsilon" (the noise), "v_prediction" (signal * eps - noise * x; Salimans and Ho 2022, appendix
            D) or "flow" (eps - x along the straight path x + s (eps - x), s = (t + 1) / 1000; Lipman et al. 2023).
        schedule: of the betas, see `alphas_cumprod`; "flow" has none.
    """

    prediction: str = "v_prediction"
    schedule: str = "linear"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise UsageError(f"unknown prediction {self.prediction!r}; the predictions are: {', '.join(PREDICTIONS)}")
        if self.prediction != "flow":
            alphas_cumprod(self.schedule)

    def levels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """signal(t) and noise(t), float32 (1000,) each."""
        if self.prediction == "flow":
            sigma = (torch.arange(TIMESTEPS, dtype=torch.float64) + 1) / TIMESTEPS
            return (1 - sigma).float(), sigma.float()
        alphas = alphas_cumprod(self.schedule)
        return alphas.sqrt(), (1 - alphas).sqrt()

    def snr(self) -> torch.Tensor:
        """Signal-to-noise ratio (signal / noise)², float64 (1000,); 0 at the end of a flow.

        Also of a flow, and in double precision, unlike `diffusers.training_utils.compute_snr`.
        """
        signal, noise = (value.double() for value in self.levels())
        return (signal / noise) ** 2

    def noisy(self, x: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy samples and the target, both of the shape of `x` (N, ...)."""
        shape = (-1,) + (1,) * (x.dim() - 1)
        signal, sigma = (level[timesteps.cpu()].to(x.device).view(shape) for level in self.levels())
        mixed = signal * x + sigma * noise
        if self.prediction == "epsilon":
            return mixed, noise
        if self.prediction == "flow":
            return mixed, noise - x
        return mixed, signal * noise - sigma * x

    def clean(self, noisy: torch.Tensor, predicted: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The clean samples that a prediction stands for: the inverse of `noisy`."""
        shape = (-1,) + (1,) * (noisy.dim() - 1)
        signal, sigma = (level[timesteps.cpu()].to(noisy.device).view(shape) for level in self.levels())
        return converted("sample", self.prediction, predicted, noisy, signal, sigma)

    def noise_in(self, noisy: torch.Tensor, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The noise that turned `x` into `noisy`."""
        shape = (-1,) + (1,) * (noisy.dim() - 1)
        signal, sigma = (level[timesteps.cpu()].to(noisy.device).view(shape) for level in self.levels())
        return converted("epsilon", "sample", x, noisy, signal, sigma)

    def model_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser gets: the index, or 1000 * s for a flow (diffusers' FlowMatchEulerDiscreteScheduler)."""
        return timesteps + 1 if self.prediction == "flow" else timesteps

    def min_snr(self, gamma: float) -> torch.Tensor:
        """Loss weights of Min-SNR-gamma (Hang et al. 2023, "Efficient diffusion training via Min-SNR", section 3.4).

        The error of the predicted image is weighted by min(SNR, gamma). In terms of what the model predicts this is
        min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v, and times s² for a flow. float32 (1000,).
        """
        if not gamma > 0:
            raise UsageError(f"the gamma of Min-SNR must be above 0, got {gamma}")
        snr = self.snr()
        clipped = snr.clamp(max=gamma)
        if self.prediction == "epsilon":
            return (clipped / snr).float()
        if self.prediction == "v_prediction":
            return (clipped / (snr + 1)).float()
        return (clipped * self.levels()[1].double() ** 2).float()


def draw_timesteps(rng: np.random.Generator, size: int, uniform: float = 0.4, mean: float = 0.0) -> torch.Tensor:
    """Training timesteps, int64 (size,) in 0..999.

    A share `uniform` of them is uniform (stratified over the batch), the rest logit-normal with standard deviation 1
    around `mean` (Esser et al. 2024, "Scaling rectified flow transformers", section 3.1); a mean above 0 favours high
    noise.
    """
    stratified = rng.permutation((np.arange(size) + rng.random(size)) / size)
    middle = 1 / (1 + np.exp(-(mean + rng.standard_normal(size))))
    position = np.where(rng.random(size) < uniform, stratified, middle)
    return torch.from_numpy(np.clip((position * TIMESTEPS).astype(np.int64), 0, TIMESTEPS - 1))
