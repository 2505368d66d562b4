"""The noise of training samples, and which noise goes with which image (Immiscible Diffusion).

Every sample has a seed of its own, so its noise does not depend on the rest of the batch, on the number of processes or
on how a batch is divided; a process only makes the noise of its own slice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from .files import UsageError


def sample_noise(seeds: torch.Tensor, shape: tuple[int, ...], candidates: int = 1) -> torch.Tensor:
    """Gaussian noise float32 (candidates, N, *shape) on the CPU; sample i depends on seeds[i] alone.

    More candidates only add draws: the first is the same for any number of them.
    """
    noise = np.empty((len(seeds), candidates, *shape), np.float32)
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        np.random.Generator(np.random.Philox(seed)).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise).transpose(0, 1)


def hashed_noise(seeds: torch.Tensor, shape: tuple[int, ...], candidates: int = 1) -> torch.Tensor:
    """Gaussian noise float32 (candidates, N, *shape) made where `seeds` are: on an accelerator, in one go.

    As `sample_noise`, with other numbers: sample i depends on seeds[i] alone, and more candidates only add draws. A
    counter and the seed go through SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators"), and 24 + 24 bits of each result through Box and Muller's transform.
    """
    size = math.prod(shape)
    pairs = -(-size // 2)
    counter = torch.arange(1, candidates * pairs + 1, device=seeds.device).view(1, candidates, pairs)
    bits = _split_mix(_split_mix(seeds.view(-1, 1, 1)) + counter * -7046029254386353131)
    radius = (-2 * torch.log((((bits >> 40) & 0xFFFFFF).float() + 0.5) / 2**24)).sqrt()
    angle = ((bits >> 16) & 0xFFFFFF).float() * (2 * math.pi / 2**24)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], 2)[..., :size]
    return both.transpose(0, 1).reshape(candidates, len(seeds), *shape)


def _split_mix(bits: torch.Tensor) -> torch.Tensor:
    """The mixing function of SplitMix64 on int64, whose products wrap around."""
    bits = (bits ^ ((bits >> 30) & (2**34 - 1))) * -4658895280553007687
    bits = (bits ^ ((bits >> 27) & (2**37 - 1))) * -7723592293110705685
    return bits ^ ((bits >> 31) & (2**33 - 1))


def nearest_noise(x: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """For each sample of `x` (N, ...) the nearest of its `candidates` (k, N, ...) in L2 distance.

    Source: Li et al. 2025, "Improved Immiscible Diffusion", the k-nearest-neighbour variant. The chosen noise is a
    little shorter than, and correlated with, the image; k = 1 is ordinary training.
    """
    if len(candidates) == 1:
        return candidates[0]
    nearest = ((candidates - x) ** 2).flatten(2).sum(2).argmin(0)
    return candidates[nearest, torch.arange(x.shape[0], device=x.device)]


def assigned_noise(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A permutation of `noise` (N, ...) over the samples of `x` with the smallest sum of L2 distances.

    Source: Li et al. 2024, "Immiscible Diffusion", algorithm 1 (linear assignment). The noise of the batch as a whole
    is unchanged. With several processes the pool is the batch of all of them: their rows are gathered, and every
    process solves the same problem and takes its own part.
    """
    from scipy.optimize import linear_sum_assignment  # optional package

    own = len(x)
    everyone, pool = _gather(x), _gather(noise)
    cost = torch.cdist(everyone.flatten(1).float(), pool.flatten(1).float())
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    first = _rank() * own
    return pool[torch.from_numpy(columns[first : first + own]).to(pool.device)]


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _gather(value: torch.Tensor) -> torch.Tensor:
    """The rows of every process, in the order of ranks."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, value.contiguous())
    return torch.cat(parts)


@dataclass(frozen=True)
class NoiseChoice:
    """Which noise a sample gets, and how large the sample is beside it.

    Attributes:
        kind: "none" (its own), "knn" (the nearest of `k`) or "assign" (linear assignment).
        k: candidates of "knn".
        scale: what a sample is multiplied by before it meets noise, 1 to 100. Images that lie further apart are mixed
            less by the same noise ("image scaling" of Li et al. 2025, "Improved Immiscible Diffusion"; the paper's
            factors are not published). What the model draws is as much larger, so whoever decodes divides by it.
    """

    kind: str = "none"
    k: int = 1
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str | None) -> NoiseChoice:
        """From "none", "assign" or "knn:k", "scale=S", or one of the former and the latter with a comma between."""
        known = text or "none"
        choice, _, scaling = known.partition(",")
        if choice.startswith("scale=") and not scaling:
            choice, scaling = "none", choice
        kind, _, number = choice.partition(":")
        counted = kind == "knn" and number.isdecimal() and len(number) < 10 and int(number) >= 1
        if not counted and not (kind in ("none", "assign") and ":" not in choice):
            raise UsageError(f"immiscible noise must be none, assign or knn:k with k >= 1, got {text!r}")
        return cls(kind, int(number) if counted else 1, cls._scale(scaling, known))

    @staticmethod
    def _scale(text: str, known: str) -> float:
        if not text and not known.endswith(","):
            return 1.0
        try:
            value = float(text.removeprefix("scale=")) if text.startswith("scale=") else float("nan")
        except ValueError:
            value = float("nan")
        if not 1 <= value <= 100:
            raise UsageError(f"image scaling is written scale=S with S from 1 to 100, got {known!r}")
        return value

    def __str__(self) -> str:
        choice = f"knn:{self.k}" if self.kind == "knn" else self.kind
        return choice if self.scale == 1 else f"{choice},scale={self.scale:g}"

    def noise_for(self, x: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """The noise of the samples `x` (N, ...), already scaled, whose seeds are `seeds` (N,)."""
        make = sample_noise if x.device.type == "cpu" else hashed_noise  # on a CPU as runs that were begun before
        noise = make(seeds.to(x.device), tuple(x.shape[1:]), self.k)
        if self.kind == "knn":
            return nearest_noise(x, noise)
        return assigned_noise(x, noise[0]) if self.kind == "assign" else noise[0]
