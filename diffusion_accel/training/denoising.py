"""What one training step of a denoiser needs: the noise schedule, targets, timesteps and the choice of noise."""

from __future__ import annotations

import numpy as np
import torch

TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02


def alphas_cumprod() -> torch.Tensor:
    """Cumulative product of 1 - beta for the linear betas of DDPM (Ho et al. 2020, section 4), float32 (1000,).

    Its last value is 4e-5: next to no signal is left at t = 999. The scaled-linear betas of Stable Diffusion end at
    4.7e-3, which on small latents still shows the mean colour.
    """
    return torch.from_numpy(np.cumprod(1 - np.linspace(BETA_START, BETA_END, TIMESTEPS))).float()


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents and the v target, both (N, C, h, w).

    v = alpha * noise - sigma * latents (Salimans and Ho 2022, "Progressive distillation", appendix D). In contrast to
    the noise itself it stays a bounded target at high noise, where a short training run has most to learn.
    """
    alpha = alphas[timesteps].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alphas[timesteps]).sqrt().view(-1, 1, 1, 1)
    return alpha * latents + sigma * noise, alpha * noise - sigma * latents


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


def nearest_noise(rng: np.random.Generator, latents: torch.Tensor, candidates: int = 4) -> torch.Tensor:
    """Gaussian noise (N, C, h, w): for each sample the nearest of `candidates` draws; 1 is plain noise.

    The k-nearest-neighbour variant of "Improved Immiscible Diffusion" (Li et al. 2025): it keeps the paths of different
    pictures apart, which makes the target at high noise less of an average.
    """
    noise = torch.from_numpy(rng.standard_normal((candidates, *latents.shape), dtype=np.float32))
    if candidates == 1:
        return noise[0]
    nearest = ((noise - latents) ** 2).flatten(2).sum(2).argmin(0)
    return noise[nearest, torch.arange(len(latents))]
