"""Fitting a combination of predictions and latents to what is wanted, and deciding by held-out images how finely.

A ridge regression around a combination that is known to be sensible: one for all channels or one for each, with more or
less trust in the images. Which of these is decided by the error on images that were not fitted to, so that few images
or many channels do not end in weights that hold for these images only. Where no fit is better there than the sensible
combination, that stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffusion_accel.combination import MOST, Combination, channel_dim

from .together import ALONE, Together

RIDGES = (1e-7, 1e-5, 1e-3)  # of the mean of the Gram matrix's diagonal
REWEIGHTED = 3  # times that images are weighed anew by their errors
EVENED = 0.25  # of the median error: images with less are alike
DIGITS = 6  # of what is written down
MOST_CHANNELS = 64  # with more, the same for all


def by_channel(tensor: torch.Tensor) -> torch.Tensor:
    """(N, C, positions) of latents, (N, C, …) or tokens (N, L, C)."""
    return tensor.movedim(channel_dim(tensor), 1).flatten(2)


def table(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Features, each (N, C, …), as one table for each image and channel, (N, C, K, positions), in float64."""
    return torch.stack([by_channel(feature).double() for feature in features], 2)


def gram(own: torch.Tensor) -> torch.Tensor:
    """The products of features with each other, (N, C, K, K), of their table."""
    return own @ own.transpose(2, 3)


@dataclass(frozen=True)
class Moments:
    """What a least-squares problem needs of each image: (N, C, K, K), (N, C, K) and (N, C)."""

    gram: torch.Tensor
    aims: torch.Tensor
    square: torch.Tensor

    @classmethod
    def of(cls, features: Sequence[torch.Tensor], target: torch.Tensor) -> Moments:
        """From features and target, each (N, C, …)."""
        own, wanted = table(features), by_channel(target).double()
        return cls(gram(own), (own @ wanted[..., None])[..., 0], wanted.pow(2).sum(2))

    def scaled(self, shares: torch.Tensor) -> Moments:
        """With each image counting so much, (N,)."""
        return Moments(
            self.gram * shares[:, None, None, None], self.aims * shares[:, None, None], self.square * shares[:, None]
        )

    def errors(self, weights: torch.Tensor) -> torch.Tensor:
        """The squared error of each image with weights, (C, K) or (1, K): (N,)."""
        w = weights.expand(self.gram.shape[1], -1)
        crossed = (w * self.aims).sum((1, 2))
        return (self.square.sum(1) - 2 * crossed + torch.einsum("ck,nckl,cl->n", w, self.gram, w)).clamp(min=0)

    def evened(self, centre: torch.Tensor, together: Together = ALONE) -> Moments:
        """With images counting less the worse they can be fitted, as a mean PSNR counts them.

        By iteratively reweighted least squares. Squared errors alone would serve the few images that nothing can help:
        those whose trajectories part at the slightest error are some 20 dB behind the others.
        """
        shares = torch.ones(len(self.square), dtype=torch.float64)
        for _ in range(REWEIGHTED):
            own = self.scaled(shares)
            whole = _total([part.sum(0) for part in (own.gram, own.aims, own.square)], together)
            errors = self.errors(whole.solved(centre, RIDGES[1]))
            everyone = torch.tensor([e for own in together.everyone(errors.tolist()) for e in own], dtype=torch.float64)
            least = EVENED * everyone.median() + 1e-30
            shares = 1 / (errors + least) / (1 / (everyone + least)).mean()
        return self.scaled(shares)

    def summed(self, images: torch.Tensor, shared: bool) -> Moments:
        """Over some of the images, and over all channels if `shared`."""
        parts = [part[images].sum(0) for part in (self.gram, self.aims, self.square)]
        return Moments(*(part.sum(0, keepdim=True) for part in parts)) if shared else Moments(*parts)

    def solved(self, centre: torch.Tensor, ridge: float) -> torch.Tensor:
        """The weights, (C, K), around `centre`, (K,); of summed moments."""
        size = ridge * self.gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-12
        own = self.gram + size[:, None, None] * torch.eye(self.gram.shape[-1], dtype=torch.float64)
        left = self.aims - (self.gram @ centre)
        return (centre + torch.linalg.solve(own, left)).clamp(-MOST, MOST)

    def error(self, weights: torch.Tensor) -> torch.Tensor:
        """The squared error of weights, (C, K) or (1, K), in all; of summed moments."""
        w = weights.expand(len(self.gram), -1)
        crossed = (w * self.aims).sum(1)
        return (self.square - 2 * crossed + (w[:, None] @ self.gram @ w[:, :, None])[:, 0, 0]).clamp(min=0).sum()


def fitted(
    features: Sequence[torch.Tensor],
    target: torch.Tensor,
    centre: Sequence[float],
    alike: bool = False,
    together: Together = ALONE,
    images: Sequence[int] | None = None,
) -> torch.Tensor:
    """The weights of each feature, (C, K) or (1, K), nearest to `target` on images that were not fitted to.

    Args:
        features: K tensors, (N, C, …).
        target: what their combination is to be.
        centre: weights that are sensible without any image, K.
        alike: the same weights for all channels, whatever the images say.
        together: the processes that fit, each with images of its own.
        images: which of the images of this process the N are; None: the first ones.
    """
    moments, middle = Moments.of(features, target), torch.tensor(list(centre), dtype=torch.float64)
    return fitted_moments(moments, middle, alike, together, images)


def fitted_moments(
    moments: Moments,
    middle: torch.Tensor,
    alike: bool = False,
    together: Together = ALONE,
    images: Sequence[int] | None = None,
) -> torch.Tensor:
    """The same from the moments of every image."""
    images = range(len(moments.square)) if images is None else images
    numbers = torch.tensor(together.numbers(images))
    few = sum(together.everyone(len(numbers))) < 4
    halves = _halves(moments if few else moments.evened(middle, together), numbers, together)
    everything, channels = torch.arange(2), moments.square.shape[1]
    if few:
        return halves.summed(everything >= 0, True).solved(middle, RIDGES[-1])
    whole = halves.summed(everything >= 0, False)
    kinds = [(shared, ridge) for shared in (False, True)[alike or channels > MOST_CHANNELS :] for ridge in RIDGES]
    losses = [0.0] * len(kinds)
    for k in (0, 1):
        inside, outside = everything == k, halves.summed(everything != k, False)
        for n, (shared, ridge) in enumerate(kinds):
            losses[n] += float(outside.error(halves.summed(inside, shared).solved(middle, ridge)))
    best = min(range(len(kinds)), key=losses.__getitem__)
    if losses[best] > float(whole.error(middle[None])):
        return middle[None].clone()
    return halves.summed(everything >= 0, kinds[best][0]).solved(middle, kinds[best][1])


def _halves(moments: Moments, numbers: torch.Tensor, together: Together) -> Moments:
    """Summed over the even and over the odd images of all processes."""
    tensors = (moments.gram, moments.aims, moments.square)
    return _total([torch.stack([part[numbers % 2 == k].sum(0) for k in (0, 1)]) for part in tensors], together)


def _total(parts: list[torch.Tensor], together: Together) -> Moments:
    """The sums of gram, aims and square over all processes, in one message."""
    sums = together.total(torch.cat([part.flatten() for part in parts])).split([part.numel() for part in parts])
    return Moments(*(own.reshape(part.shape) for own, part in zip(sums, parts, strict=True)))


def combination(weights: torch.Tensor, predictions: int, latents: int) -> Combination:
    """Weights as a combination: the first of predictions, then of latents, the others of what guidance adds."""
    rows = [[round(float(v), DIGITS) for v in row] for row in weights]
    spans = (0, predictions), (predictions, predictions + latents), (predictions + latents, None)
    return Combination(*(tuple(tuple(row[start:end]) for row in rows) for start, end in spans))


def mixed(weights: torch.Tensor, features: Sequence[torch.Tensor]) -> torch.Tensor:
    """The combination of features with these weights, (C, K) or (1, K)."""
    shape = [1] * features[0].dim()
    shape[channel_dim(features[0])] = len(weights)
    total = torch.zeros_like(features[0])
    for column, feature in zip(weights.T.to(features[0].dtype), features, strict=True):
        total += column.reshape(shape) * feature
    return total
