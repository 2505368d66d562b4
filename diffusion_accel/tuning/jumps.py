"""A few evaluations and fitted jumps between them: what every fast sampler is.

Between two evaluations of the denoiser a linear solver does nothing but combine what it has: the predictions so far and
the latents. So whatever stands between them, held steps or none, is one combination for each channel, and it can be
fitted: to where a reference trajectory is at the next evaluation. The fit is made on the way, with what the jumps
before it have really left (error feedback), so each makes up for the errors of those before it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffusion_accel.combination import Combination
from diffusion_accel.prediction import Conversion, converted
from diffusion_accel.reuse.history import History

from .fits import by_channel, combination, fitted, mixed
from .replay import Recording, Replay, Said
from .together import ALONE, Together

PREDICTIONS, LATENTS, ADDITIONS = 4, 3, 2  # how many a jump combines at most
ORDER = 1  # of the forecast of the difference of the branches of guidance
KEPT = 2**28  # bytes of clean samples and latents at the beginnings of rollouts that are kept
CEILING = 1e-10  # least squared error that counts


@dataclass(frozen=True)
class Trajectory:
    """Where samples should be.

    Attributes:
        times: of its nodes, (M,); behind the last one is the result, node M.
        alphas, sigmas: of the M + 1 nodes; 1 and 0 of the result.
        latents, predictions: (M, N, C, …), as the denoiser sees them and what it says, in float32 or float16.
        result: (N, C, …).
        kind: what the denoiser predicts, as `prediction.converted` has it.
        alike: whether jumps are fitted alike for all channels, since it is not known which dimension has them.
    """

    times: list[float]
    alphas: list[float]
    sigmas: list[float]
    latents: torch.Tensor
    predictions: torch.Tensor
    result: torch.Tensor
    kind: str
    alike: bool = False

    @classmethod
    def of(cls, recording: Recording, conversion: Conversion) -> Trajectory:
        """What was recorded of a call with the scheduler of `conversion`; nothing is copied."""
        both = [conversion.coefficients(t) for t in recording.times]
        alphas, sigmas = [a for a, _ in both] + [1.0], [s for _, s in both] + [0.0]
        kept = recording.latents, recording.predictions, recording.result
        return cls(recording.times, alphas, sigmas, *kept, conversion.kind, not recording.channelwise)

    def __len__(self) -> int:
        return len(self.times)

    def goal(self, node: int, images: Sequence[int]) -> torch.Tensor:
        """Where some images should be at a node, or in the end: (len(images), C, …), float32."""
        return self.result[images] if node == len(self) else self.latents[node][images].float()

    def clean(self, images: Sequence[int] | slice = slice(None)) -> torch.Tensor:
        """The clean samples that the predictions of images mean, (M, N, C, …)."""
        both = zip(self.predictions, self.latents, self.alphas[:-1], self.sigmas[:-1], strict=True)
        return torch.stack(
            [converted("sample", self.kind, v[images].float(), x[images].float(), a, s) for v, x, a, s in both]
        )

    def part(self, nodes: Sequence[int]) -> Trajectory:
        """Some of its nodes, and the result."""
        ends = [*nodes, len(self)]
        return Trajectory(
            [self.times[n] for n in nodes],
            [self.alphas[n] for n in ends],
            [self.sigmas[n] for n in ends],
            self.latents[list(nodes)],
            self.predictions[list(nodes)],
            self.result,
            self.kind,
            self.alike,
        )


@dataclass(frozen=True)
class Seen:
    """What a solver has at a node: clean samples and latents of the last evaluations, the newest first, and, where they
    are known, what guidance adds, as clean samples, and the last differences of its branches."""

    clean: tuple[torch.Tensor, ...] = ()
    latents: tuple[torch.Tensor, ...] = ()
    additions: tuple[torch.Tensor, ...] = ()
    differences: History | None = None

    def then(
        self,
        clean: torch.Tensor,
        latents: torch.Tensor,
        addition: torch.Tensor | None = None,
        differences: History | None = None,
    ) -> Seen:
        """With one evaluation more."""
        apart = () if addition is None else (addition, *self.additions)[:ADDITIONS]
        return Seen((clean, *self.clean)[:PREDICTIONS], (latents, *self.latents)[:LATENTS], apart, differences)

    @property
    def features(self) -> list[torch.Tensor]:
        """What can be combined."""
        return [*self.clean, *self.latents, *self.additions]

    def centre(self, trajectory: Trajectory, start: int, end: int) -> list[float]:
        """The weights of the DDIM update from node `start` to node `end`."""
        (a, s), (b, r) = ((trajectory.alphas[n], trajectory.sigmas[n]) for n in (start, end))
        weights = [0.0] * len(self.features)
        weights[0], weights[len(self.clean)] = b - r / s * a, r / s
        return weights


@dataclass(frozen=True)
class Rolled:
    """A rollout: the nodes at which the denoiser was evaluated, the weights of each jump, (C, K), and the result."""

    nodes: tuple[int, ...]
    weights: tuple[torch.Tensor, ...]
    result: torch.Tensor
    decibels: torch.Tensor

    @property
    def combinations(self) -> list[Combination]:
        """The jumps as combinations of clean samples and latents, where what guidance adds is not told apart."""
        return [combination(w, min(n, PREDICTIONS), min(n, LATENTS)) for n, w in enumerate(self.weights, 1)]


def step_of(node: int) -> int:
    """The number of the step of a node: n, or ~n where only the conditional branch is computed."""
    return max(node, ~node)


def evaluated(
    replay: Replay,
    trajectory: Trajectory,
    node: int,
    x: torch.Tensor,
    images: Sequence[int],
    apart: bool,
    known: History | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, History | None]:
    """The clean sample that the denoiser means at a node, the latents, and, if it is told apart, what guidance adds to
    it, as a clean sample, and the last differences of the branches, which at a node ~n are those that are known."""
    own = step_of(node)
    kind, a, s, time = trajectory.kind, trajectory.alphas[own], trajectory.sigmas[own], trajectory.times[own]
    forecast = known.at(time, ORDER) if known and node < 0 else None
    said = replay.apart(x, time, images, forecast) if apart else Said(replay(x, time, images))
    clean = converted("sample", kind, said.prediction, x, a, s)
    if said.addition is None:
        return clean, x, None, None
    adding = converted("sample", kind, said.addition, torch.zeros_like(x), a, s)
    if forecast is None:
        known = (known or History(ORDER + 1)).and_then(time, said.difference)
    return clean, x, adding, known


class Beginnings:
    """The states of rollouts after their first evaluations, so that none is made twice; the least used are forgotten.

    Attributes:
        most: tensors that are kept; those that beginnings share count once.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[tuple[int, ...], tuple[Seen, tuple[torch.Tensor, ...]]] = OrderedDict()
        self._tensors: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._tensors)

    def longest(self, nodes: tuple[int, ...]) -> tuple[int, Seen, tuple[torch.Tensor, ...]]:
        """How many of these nodes are known, the state after them and the weights on the way."""
        for n in range(len(nodes), 0, -1):
            if nodes[:n] in self._kept:
                self._kept.move_to_end(nodes[:n])
                return n, *self._kept[nodes[:n]]
        return 0, Seen(), ()

    def keep(self, nodes: tuple[int, ...], seen: Seen, weights: tuple[torch.Tensor, ...]) -> None:
        """Remember the state after these nodes."""
        self._kept[nodes] = seen, weights
        self._tensors.update(map(id, _tensors(seen)))
        while len(self._tensors) > self.most and len(self._kept) > 1:
            _, (old, _) = self._kept.popitem(last=False)
            self._tensors.subtract(map(id, _tensors(old)))
            self._tensors = +self._tensors


def _tensors(seen: Seen) -> list[torch.Tensor]:
    return [*seen.features, *(seen.differences.values if seen.differences else ())]


class Jumps:
    """Rollouts for some images of a recording, towards a trajectory.

    Attributes:
        replay: the denoiser.
        trajectory: where to be.
        images: which images.
        weights: of the channels in the error of the result, (C,).
        together: the processes that do so, each with images of its own.
        apart: whether jumps may use what guidance adds.
    """

    def __init__(
        self,
        replay: Replay,
        trajectory: Trajectory,
        images: Sequence[int],
        weights: torch.Tensor | None = None,
        together: Together = ALONE,
        apart: bool = False,
    ) -> None:
        self.apart = apart
        self.replay, self.trajectory, self.images, self.together = replay, trajectory, list(images), together
        channels = by_channel(trajectory.result).shape[1]
        self.weights = torch.ones(channels) if weights is None else weights / weights.mean()
        most = max(together.everyone(len(self.images)))  # the same everywhere, for all must forget the same
        self.beginnings = Beginnings(KEPT // (4 * max(1, most) * trajectory.result[0].numel()))

    def run(self, nodes: Sequence[int]) -> Rolled:
        """Evaluate at these nodes, beginning on the trajectory at the first one, and fit every jump on the way; at a
        node ~n, which needs `apart`, the conditional branch only, with the forecast difference to the other one."""
        nodes, trajectory = tuple(nodes), self.trajectory
        known, seen, weights = self.beginnings.longest(nodes)
        for n in range(known, len(nodes)):
            x = trajectory.goal(nodes[0], self.images)
            if n:
                weights = (*weights, self._jump(seen, step_of(nodes[n - 1]), step_of(nodes[n])))
                x = mixed(weights[-1], seen.features)
            seen = self.evaluated(seen, x, nodes[n])
            self.beginnings.keep(nodes[: n + 1], seen, weights)
        weights = (*weights, self._jump(seen, step_of(nodes[-1]), len(trajectory)))
        result = mixed(weights[-1], seen.features)
        return Rolled(nodes, weights, result, self.decibels(result))

    def from_the_middle(self, nodes: Sequence[int]) -> dict[int, tuple[Combination, ...]]:
        """What stands in for the jumps behind each node but the first where the rollout begins there or shortly
        before: by the number of the jump, with one evaluation, with two, … as long as a jump could use more."""
        most = max(PREDICTIONS, LATENTS) - 1
        begun = {first: self.run(nodes[first : first + most + 1]).combinations for first in range(1, len(nodes))}
        return {
            n: tuple(begun[n + 1 - made][made - 1] for made in range(1, min(most, n) + 1)) for n in range(1, len(nodes))
        }

    def follow(self, nodes: Sequence[int], weights: Sequence[torch.Tensor]) -> Rolled:
        """The same with weights that are given."""
        seen, x = Seen(), self.trajectory.goal(0, self.images)
        for node, jump in zip(nodes, weights, strict=True):
            seen = self.evaluated(seen, x, node)
            x = mixed(jump, seen.features)
        return Rolled(tuple(nodes), tuple(weights), x, self.decibels(x))

    def evaluated(self, seen: Seen, x: torch.Tensor, node: int) -> Seen:
        """With an evaluation at these latents."""
        own = self.trajectory
        return seen.then(*evaluated(self.replay, own, node, x, self.images, self.apart, seen.differences))

    def decibels(self, result: torch.Tensor) -> torch.Tensor:
        """PSNR of each image in its latents, up to a constant: (N,)."""
        error = by_channel(result - self.trajectory.result[self.images]).pow(2).mean(2) @ self.weights.to(result.dtype)
        return -10 * torch.log10((error / len(self.weights)).clamp(min=CEILING)).double()

    def _jump(self, seen: Seen, start: int, end: int) -> torch.Tensor:
        goal, centre = self.trajectory.goal(end, self.images), seen.centre(self.trajectory, start, end)
        return fitted(seen.features, goal, centre, self.trajectory.alike, self.together, self.images)
