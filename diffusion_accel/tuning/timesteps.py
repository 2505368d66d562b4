"""Which steps to evaluate: a dynamic programme over what jumps along a reference trajectory leave, then real rollouts.

The error that a jump leaves on the reference trajectory itself, from two evaluations to where it is later, is a
least-squares residual in the Gram matrix of the recorded clean samples and latents: nothing needs to be run. How much
of it reaches the result is a profile over the trajectory, which rollouts teach. The sum over the jumps is what the
programme minimises, for every number of evaluations at once; what it does not know, the search on rollouts corrects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch

from .fits import MOST_CHANNELS, by_channel
from .jumps import Trajectory
from .together import ALONE, Together

RIDGE = 1e-8
ROUNDS = 3  # of the dynamic programme, each followed by rollouts of what it found
KNOTS = (0.2, 0.4, 0.6, 0.8, 0.9, 0.97)  # shares of the trajectory at which the profile is adjusted
STEEPNESS = 6.0  # of the profile before anything was run: an early error counts exp(-6) times as much as a late one
SMOOTH, NEAR = 0.02, 0.02  # how much a profile is kept smooth, and near the one before
SHIFTS = (1, -1, 2, -2, 3, -3)
LUCK = 2.0  # dB; how much one image counts at most when two rollouts are compared
MISTAKEN = 0.7  # dB; by how much predicted differences of two rollouts are off
LEAST = 1e-12  # squared error
RISK = 0.5  # of the profile's logarithms, where the worst images count
SCALES = (RISK, 1.5, 0.0)  # of the profile's logarithms, for other nodes to begin with

Nodes = tuple[int, ...]


def residuals(
    trajectory: Trajectory, images: Sequence[int], weights: torch.Tensor, together: Together = ALONE
) -> np.ndarray:
    """The mean squared error of a jump from node i, with node h evaluated before it, to node j: (M, M, M + 1), at
    [h, i, j]; at [0, 0, j] that of the first jump. Infinite where h ≥ i or i ≥ j.

    Args:
        trajectory: with M nodes and the result behind them.
        images: which images count.
        weights: of the channels, (C,).
        together: the processes that have images.
    """
    size = len(trajectory)
    shared = trajectory.alike or len(weights) > MOST_CHANNELS  # as `fits` does
    weights = torch.ones(1) if shared else weights
    gram, count = _gram(trajectory, images, shared, together)
    share = (weights / weights.sum()).double()
    found = np.full((size, size, size + 1), np.inf)
    goals = torch.arange(size, 2 * size + 1)
    squares = gram[:, goals, goals]
    for i in range(size):
        before = list(range(i)) if i else [0]
        rows = torch.tensor([[i, h, size + i, size + h] if i else [0, size] for h in before])
        own = gram[:, rows[:, :, None], rows[:, None, :]]  # (C, h, K, K)
        scale = own.diagonal(dim1=2, dim2=3).mean(2)[..., None, None]
        own = own + RIDGE * scale * torch.eye(rows.shape[1], dtype=torch.float64)
        aims = gram[:, rows][..., goals[i + 1 :]]  # (C, h, K, j)
        left = squares[:, None, i + 1 :] - (aims * torch.linalg.solve(own, aims)).sum(2)
        found[before, i, i + 1 :] = torch.einsum("c,chj->hj", share, left.clamp(min=0)).numpy() / count
    return found


def _gram(
    trajectory: Trajectory, images: Sequence[int], shared: bool, together: Together
) -> tuple[torch.Tensor, float]:
    """The Gram matrix of clean samples and latents for each channel, (C, 2M + 1, 2M + 1), or of all of them together,
    and of how many numbers.

    One image at a time, and in float64 a part of it, so that it takes next to no memory.
    """
    rows, channels = 2 * len(trajectory) + 1, 1 if shared else by_channel(trajectory.result[:1]).shape[1]
    gram, count = torch.zeros(channels, rows, rows, dtype=torch.float64), 0
    for image in images:
        latents = [trajectory.latents[:, image].float(), trajectory.result[image][None]]
        table = torch.cat([by_channel(part) for part in (trajectory.clean([image])[:, 0], *latents)])
        table = table.reshape(rows, channels, -1)
        for c in range(channels):
            gram[c] += sum(part.double() @ part.double().T for part in table[:, c].split(2**16, 1))
        count += table.shape[2]
    everything = together.total(torch.cat([gram.flatten(), torch.tensor([float(count)]).double()]))
    return everything[:-1].reshape(gram.shape), float(everything[-1])


def best_nodes(cost: np.ndarray, most: int) -> dict[int, Nodes]:
    """For every number of evaluations up to `most` the nodes with the smallest sum of costs to the result.

    Args:
        cost: of each jump, as `residuals` has it.
        most: evaluations.
    """
    size = cost.shape[1]
    value = np.full((size, size), np.inf)  # of the best way to the last two evaluations (h, i)
    value[0, 0] = 0.0
    found: dict[int, Nodes] = {}
    ways: list[np.ndarray] = []
    for count in range(1, most + 1):
        ends = value + cost[:, :, size]
        if np.isfinite(ends.min()):
            h, i = np.unravel_index(int(ends.argmin()), ends.shape)
            found[count] = _way(ways, int(h), int(i))
        total = value[:, :, None] + cost[:, :, :size]  # h, i -> j
        ways.append(total.argmin(0))  # for (i, j) the best h
        value = total.min(0)
    return found


def _way(ways: Sequence[np.ndarray], h: int, i: int) -> Nodes:
    nodes = [i]
    for table in reversed(ways):
        nodes.append(h)
        h, i = int(table[h, i]), h
    return tuple(reversed(nodes))


class Profile:
    """How much of a squared error at a node reaches the result, learnt from rollouts.

    Attributes:
        left: see `residuals`.
        logarithms: at the knots; 0 at the end.
    """

    def __init__(self, left: np.ndarray) -> None:
        self.left, self.size = left, left.shape[1]
        self.logarithms = np.array([-STEEPNESS * (1 - knot) for knot in KNOTS])

    def weights(self, logarithms: np.ndarray | None = None) -> np.ndarray:
        """At every node and at the result, (M + 1,)."""
        own = self.logarithms if logarithms is None else logarithms
        return np.exp(np.interp(np.arange(self.size + 1), np.array([*KNOTS, 1.0]) * self.size, [*own, 0.0]))

    def cost(self) -> np.ndarray:
        """Of every jump."""
        return self.left * self.weights()

    def predicted(self, nodes: Nodes, scale: float = 1.0) -> float:
        """The mean squared error of a rollout, with the logarithms scaled if wanted."""
        jumps, ends = self._jumps(nodes)
        return float(jumps @ self.weights(scale * self.logarithms)[ends])

    def learn(self, runs: Iterable[tuple[Nodes, float]]) -> None:
        """Adjust to rollouts: pairs of nodes and the squared error that they had, a geometric mean over images."""
        seen = [(*self._jumps(nodes), np.log(max(error, LEAST))) for nodes, error in runs]
        before = self.logarithms

        def loss(own: np.ndarray) -> float:
            weights = self.weights(own)
            off = sum((np.log(max(jumps @ weights[ends], LEAST)) - error) ** 2 for jumps, ends, error in seen)
            bends = np.diff(np.append(own, 0.0), 2)
            return float(off + SMOOTH * (bends**2).sum() + NEAR * ((own - before) ** 2).sum())

        own, least, step = before.copy(), loss(before), 1.0
        while step > 0.02:
            moved = False
            for k in range(len(own)):
                for change in (step, -step):
                    other = own.copy()
                    other[k] = min(0.5, other[k] + change)
                    if (value := loss(other)) < least:
                        own, least, moved = other, value, True
            step = step if moved else step / 2
        self.logarithms = own

    def _jumps(self, nodes: Nodes) -> tuple[np.ndarray, list[int]]:
        ends = [*nodes[1:], self.size]
        before = [0, *nodes[:-1]]
        return np.array([self.left[h, i, j] for h, i, j in zip(before, nodes, ends, strict=True)]), ends


class NodeSearch:
    """Finds the steps to evaluate, for one number of evaluations or for many.

    Attributes:
        run: the scores of the images in dB of a rollout with some nodes.
        profile: what is predicted of rollouts that were not run.
        known: the scores of all that were.
    """

    def __init__(self, run: Callable[[Nodes], Sequence[float]], left: np.ndarray) -> None:
        self.run, self.profile = run, Profile(left)
        self.known: dict[Nodes, np.ndarray] = {}
        self._best: dict[int, Nodes] = {}

    def leads(self, nodes: Nodes) -> bool:
        """Run a rollout, if it was not yet: whether it is the best of as many nodes now."""
        if nodes not in self.known:
            self.known[nodes] = np.asarray(self.run(nodes), dtype=float)
            best = self._best.get(len(nodes))
            if best is None or self._ahead(nodes, best) > 0:
                self._best[len(nodes)] = nodes
        return self._best[len(nodes)] == nodes

    def _ahead(self, nodes: Nodes, other: Nodes) -> float:
        """By how much a rollout is nearer than another one, in dB.

        Image by image, of which each counts at most `LUCK`: a few images leave the baseline at the slightest error and
        come out anywhere, so that a worst image, or the worst decile of a few, tells which plan was lucky. The more
        the images disagree and the fewer they are, the more counts what is predicted from the errors of all of them.
        In that early errors count for more than the mean says (`RISK`): they decide which images leave it.
        """
        each = self.known[nodes] - self.known[other]
        seen, noise = np.clip(each, -LUCK, LUCK).mean(), each.var() / len(each)
        risks = [max(self.profile.predicted(n, RISK), LEAST) for n in (other, nodes)]
        predicted = 10 * np.log10(risks[0] / risks[1])
        share = noise / (noise + MISTAKEN**2)
        return float((1 - share) * seen + share * np.clip(predicted, -LUCK, LUCK))

    def decibels(self, size: int) -> float:
        """The mean over the images of the best rollout with so many nodes."""
        return float(self.known[self.best(size)].mean())

    def _errors(self, size: int | None = None) -> list[tuple[Nodes, float]]:
        """What rollouts, or those of one size, teach."""
        seen = [(nodes, float(10 ** (-v.mean() / 10))) for nodes, v in self.known.items()]
        return [(nodes, error) for nodes, error in seen if size in (None, len(nodes))]

    def rounds(self, sizes: Sequence[int], count: int, go_on: Callable[[], bool]) -> None:
        """Let the dynamic programme find nodes for each size, run them, learn from that, and so on."""
        for size in sizes:
            self.leads(evenly(self.profile.size, size))
        for _ in range(count):
            self.profile.learn(self._errors())
            found = best_nodes(self.profile.cost(), max(sizes))
            new = [found[size] for size in sizes if size in found and found[size] not in self.known]
            for nodes in new:
                if not go_on():
                    return
                self.leads(nodes)
            if not new:
                return

    def every(
        self,
        sizes: Sequence[int],
        share: Callable[[float], Callable[[], bool]],
        told: Callable[[int], None] = lambda _: None,
    ) -> list[Nodes]:
        """The best nodes for each size: the dynamic programme for all of them together, then each gets as much of what
        is left as those behind it.

        Args:
            sizes: numbers of evaluations.
            share: of a part of what may still be spent, 0 to 1: whether there is some of that left, asked again and
                again.
            told: the size after each of its rollouts.
        """
        self.rounds(sizes, ROUNDS, share(1.0))
        for done, size in enumerate(sizes):
            self.refine(size, share(1 / (len(sizes) - done)), partial(told, size))
        return [self.best(size) for size in sizes]

    def best(self, size: int) -> Nodes:
        """The best nodes so far."""
        return self._best[size]

    def likely(self, size: int) -> Nodes:
        """The best nodes so far, or, where none were run, those that the dynamic programme finds."""
        return self._best[size] if size in self._best else best_nodes(self.profile.cost(), size)[size]

    def _others(self, size: int) -> list[Nodes]:
        """What the dynamic programme finds if early errors count more, or less, than the rollouts say."""
        own = self.profile.logarithms
        found = [best_nodes(self.profile.left * self.profile.weights(scale * own), size) for scale in SCALES]
        return list(dict.fromkeys(nodes[size] for nodes in found if size in nodes))

    def refine(self, size: int, go_on: Callable[[], bool], told: Callable[[], None] = lambda: None) -> None:
        """Try what is nearly the same as the best, the most promising first, until nothing is left or it is time."""
        while go_on():
            best = self.best(size)
            self.profile.learn(self._errors(size))
            candidates = [nodes for nodes in self._others(size) if nodes not in self.known]
            near = [nodes for nodes in neighbours(best, self.profile.size) if nodes not in self.known]
            if not candidates and not near:
                return
            for nodes in candidates or sorted(near, key=self.profile.predicted)[:4]:
                if not go_on():
                    return
                leads = self.leads(nodes)
                told()
                if leads:
                    break


def evenly(size: int, count: int) -> Nodes:
    """Nodes at equal distances, the first of which is 0."""
    return tuple(sorted({round(k * size / count) for k in range(count)}))


def neighbours(nodes: Nodes, size: int) -> list[Nodes]:
    """One node moved a little, or two beside each other moved together."""
    found = set()
    for k in range(1, len(nodes)):
        for end in (k + 1, min(k + 2, len(nodes))):
            for shift in SHIFTS:
                other = (*nodes[:k], *(n + shift for n in nodes[k:end]), *nodes[end:])
                if sorted(set(other)) == list(other) and other[1] > 0 and other[-1] < size:
                    found.add(other)
    return sorted(found)
