"""Polishing fitted jumps together, by gradients of what is left in the end.

The fit on the way lets each jump land as near to the trajectory as it can. That is greedy: what is best for the next
node need not be best for the result. So the weights of all jumps are moved at once, downhill in the mean logarithm of
the images' errors, with the gradient taken through every evaluation of the denoiser. The steps are Adam's, in
coordinates in which a step moves the latents by as much in every direction: by the Cholesky factor of each jump's Gram
matrix. Some images are only watched: the weights that are best for them are kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch.utils.checkpoint import checkpoint

from .fits import by_channel, gram, mixed, table
from .jumps import Jumps, Rolled, Seen, Trajectory, evaluated
from .timesteps import LUCK

logger = logging.getLogger(__name__)

GROUP = 16  # images of one gradient, over all processes
WATCHED = 4  # one image of so many is only watched
CHECKED = 4  # gradients between two looks at them
PATIENCE = 4  # looks without an improvement
PACE = 0.02  # of a first step, in errors of the result
EVENED = 0.05  # of the median error: images with less count alike
RIDGE = 1e-6
MOST = 400  # gradients


def polished(jumps: Jumps, rolled: Rolled, left: Callable[[], float]) -> Rolled:
    """A rollout with better weights, or the same one where no gradient can be taken through the denoiser.

    Args:
        jumps: of all calibration images.
        rolled: their rollout with the fitted weights.
        left: the share of the time that is left, 1 to 0; asked in the first process only.
    """
    together = jumps.together
    if min(together.everyone(len(jumps.images))) < WATCHED:
        return rolled
    own = jumps.images
    watched, others = own[::WATCHED], [image for n, image in enumerate(own) if n % WATCHED]
    with torch.inference_mode(False):
        course = _Course(jumps, rolled)
        failed = together.everyone(course.obstacle(others[:1]))
        if reason := next(filter(None, failed), ""):
            logger.info("the jumps are not polished: %s", reason)
            return rolled
        weights = _descended(course, watched, others, left)
    return rolled if weights is None else jumps.follow(rolled.nodes, weights)


class _Course:
    """The way of some images from the noise to the result, for gradients."""

    def __init__(self, jumps: Jumps, rolled: Rolled) -> None:
        self.jumps, self.nodes = jumps, rolled.nodes
        own = jumps.trajectory
        kept = own.latents[0].float().clone(), own.result.clone()  # those of a recording cannot be saved for a gradient
        self.start, self.goal = kept
        self.weights = [w.clone() for w in rolled.weights]
        self.factors = [torch.eye(w.shape[1], dtype=torch.float64).expand(len(w), -1, -1) for w in self.weights]

    def moved(self, moves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The weights of all jumps after moves in even coordinates."""
        pairs = zip(self.weights, self.factors, moves, strict=True)
        return [w + (factor @ z.double()[..., None])[..., 0] for w, factor, z in pairs]

    def errors(
        self, weights: Sequence[torch.Tensor], images: Sequence[int], features: list[list[torch.Tensor]] | None = None
    ) -> torch.Tensor:
        """The mean squared error of each image in the end, (N,); the features of every jump on the way, if asked."""
        seen, x = Seen(), self.start[images]
        for node, jump in zip(self.nodes, weights, strict=True):
            clean, latents, *adding = self._evaluated(x, node, images)
            seen = seen.then(clean, latents, adding[0] if adding else None)
            if features is not None:
                features.append(seen.features)
            x = mixed(jump, seen.features)
        channels = self.jumps.weights.clone().to(x.dtype)
        return by_channel(x - self.goal[images]).pow(2).mean(2) @ channels / len(channels)

    def _evaluated(self, x: torch.Tensor, node: int, images: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """One evaluation, of which a gradient keeps nothing but the latents."""
        own: Trajectory = self.jumps.trajectory

        def run(latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
            parts = evaluated(self.jumps.replay, own, node, latents, images, self.jumps.apart)[:3]
            return tuple(part for part in parts if part is not None)

        if not x.requires_grad:
            return run(x)
        made: tuple[torch.Tensor, ...] = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        return made

    def obstacle(self, images: Sequence[int]) -> str:
        """Why no gradient can be taken; empty if one can."""
        moves = [torch.zeros_like(w, requires_grad=True) for w in self.weights]
        try:
            with torch.enable_grad():
                errors = self.errors(self.moved(moves), images)
                found = torch.autograd.grad(errors.sum(), moves)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:  # also too little memory
            return str(error).splitlines()[0][:200] or type(error).__name__
        return "" if all(bool(g.isfinite().all()) for g in found) else "its gradient is not finite"

    def even(self, images: Sequence[int]) -> None:
        """Set the factors, so that a move by 1 changes the latents by 1, root mean square, in every direction."""
        features: list[list[torch.Tensor]] = []
        with torch.no_grad():
            self.errors(self.weights, images, features)
        for n, parts in enumerate(features):
            shared = len(self.weights[n]) == 1
            own = table(parts)
            products = gram(own).sum((0, 1) if shared else 0)
            count = own.shape[0] * own.shape[3] * (own.shape[1] if shared else 1)
            sums = self.jumps.together.total(torch.cat([products.flatten(), torch.tensor([float(count)]).double()]))
            mean = (sums[:-1] / sums[-1]).reshape(-1, *products.shape[-2:])
            size = RIDGE * mean.diagonal(dim1=1, dim2=2).mean(1) + 1e-12
            whole = mean + size[:, None, None] * torch.eye(mean.shape[-1], dtype=torch.float64)
            self.factors[n] = torch.linalg.inv(torch.linalg.cholesky(whole)).transpose(1, 2)


def _descended(
    course: _Course, watched: Sequence[int], others: Sequence[int], left: Callable[[], float]
) -> list[torch.Tensor] | None:
    """The best weights on the way down; None if those at its beginning are."""
    together = course.jumps.together
    course.even(others)
    before = _seen(course, course.weights, watched)
    median = float(torch.tensor([e for part in together.everyone(before.tolist()) for e in part]).median())
    moves = [torch.zeros_like(w, requires_grad=True) for w in course.weights]
    pace = PACE * math.sqrt(median)
    adam = torch.optim.Adam(moves, lr=pace)
    best, most, waited, size = None, 0.0, 0, max(1, GROUP // together.size)
    for turn in range(MOST):
        share = max(together.agreed(left() if together.first else None), 0.0)
        if share <= 0 or waited >= PATIENCE:
            break
        group = [others[(turn * size + k) % len(others)] for k in range(min(size, len(others)))]
        for given in adam.param_groups:
            given["lr"] = pace * min(1.0, 2 * share)
        _step(course, adam, moves, sorted(set(group)), EVENED * median)
        if turn % CHECKED == CHECKED - 1:
            now = _seen(course, course.moved([z.detach() for z in moves]), watched)
            gained = (10 * torch.log10(before / now)).clamp(-LUCK, LUCK).sum()
            gain = float(together.total(gained)) / sum(together.everyone(len(watched)))
            waited += 1
            if gain > most:
                best, most, waited = course.moved([z.detach() for z in moves]), gain, 0
    return best


def _step(
    course: _Course, adam: torch.optim.Optimizer, moves: list[torch.Tensor], images: list[int], least: float
) -> None:
    """One step downhill, with the gradient of the images of all processes."""
    with torch.enable_grad():
        loss = torch.log(course.errors(course.moved(moves), images) + least).sum()
        found = torch.autograd.grad(loss, moves)
    parts = torch.cat([*(g.flatten() for g in found), torch.tensor([float(len(images))])])
    total = course.jumps.together.total(parts)
    sums = (total[:-1] / total[-1]).split([z.numel() for z in moves])
    for z, own in zip(moves, sums, strict=True):
        z.grad = own.reshape(z.shape).to(z.dtype)
    adam.step()


def _seen(course: _Course, weights: Sequence[torch.Tensor], images: Sequence[int]) -> torch.Tensor:
    """The errors of images, without a gradient."""
    with torch.no_grad():
        return course.errors(weights, images).double().clamp(min=1e-12)
