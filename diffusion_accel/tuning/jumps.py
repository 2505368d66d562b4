"""A few evaluations and fitted jumps between them: what every fast sampler is.

Between two evaluations of the denoiser a linear solver does nothing but combine what it has: the predictions so far and
the latents. So whatever stands between them, held steps or none, is one combination for each channel, and it can be
fitted: to where a reference trajectory is at the next evaluation. The fit is made on the way, with what the jumps
before it have really left (error feedback), so each makes up for the errors of those before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffusion_accel.combination import Combination
from diffusion_accel.prediction import Conversion, converted

from .fits import by_channel, combination, fitted, mixed
from .replay import Recording, Replay

PREDICTIONS, LATENTS = 4, 3  # how many a jump combines at most
KEPT = 400  # prefixes whose state is kept
CEILING = 1e-10  # least squared error that counts


@dataclass(frozen=True)
class Trajectory:
    """Where samples should be.

    Attributes:
        times: of its nodes, (M,); behind the last one is the result, node M.
        alphas, sigmas: of the M + 1 nodes; 1 and 0 of the result.
        latents: (M + 1, N, C, …), as the denoiser sees them.
        clean: the clean samples that its predictions mean, (M, N, C, …).
        kind: what the denoiser predicts, as `prediction.converted` has it.
        alike: whether jumps are fitted alike for all channels, since it is not known which dimension has them.
    """

    times: list[float]
    alphas: list[float]
    sigmas: list[float]
    latents: torch.Tensor
    clean: torch.Tensor
    kind: str
    alike: bool = False

    @classmethod
    def of(cls, recording: Recording, conversion: Conversion) -> Trajectory:
        """What was recorded of a call with the scheduler of `conversion`."""
        both = [conversion.coefficients(t) for t in recording.times]
        clean = [
            converted("sample", conversion.kind, v, x, a, s)
            for v, x, (a, s) in zip(recording.predictions, recording.latents, both, strict=True)
        ]
        return cls(
            recording.times,
            [a for a, _ in both] + [1.0],
            [s for _, s in both] + [0.0],
            torch.cat([recording.latents, recording.result[None]]),
            torch.stack(clean),
            conversion.kind,
            not recording.channelwise,
        )

    def __len__(self) -> int:
        return len(self.times)

    def part(self, nodes: Sequence[int]) -> Trajectory:
        """Some of its nodes, and the result."""
        ends = [*nodes, len(self)]
        return Trajectory(
            [self.times[n] for n in nodes],
            [self.alphas[n] for n in ends],
            [self.sigmas[n] for n in ends],
            self.latents[ends],
            self.clean[list(nodes)],
            self.kind,
            self.alike,
        )


@dataclass(frozen=True)
class Seen:
    """What a solver has at a node: clean samples and latents of the last evaluations, the newest first."""

    clean: tuple[torch.Tensor, ...] = ()
    latents: tuple[torch.Tensor, ...] = ()

    def then(self, clean: torch.Tensor, latents: torch.Tensor) -> Seen:
        """With one evaluation more."""
        return Seen((clean, *self.clean)[:PREDICTIONS], (latents, *self.latents)[:LATENTS])

    @property
    def features(self) -> list[torch.Tensor]:
        """What can be combined."""
        return [*self.clean, *self.latents]

    def centre(self, trajectory: Trajectory, start: int, end: int) -> list[float]:
        """The weights of the DDIM update from node `start` to node `end`."""
        (a, s), (b, r) = ((trajectory.alphas[n], trajectory.sigmas[n]) for n in (start, end))
        weights = [0.0] * (len(self.clean) + len(self.latents))
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
        """The jumps as combinations of clean samples and latents."""
        return [combination(w, min(n, PREDICTIONS)) for n, w in enumerate(self.weights, 1)]


class Jumps:
    """Rollouts for some images of a recording, towards a trajectory.

    Attributes:
        replay: the denoiser.
        trajectory: where to be.
        images: which images.
        weights: of the channels in the error of the result, (C,).
    """

    def __init__(
        self, replay: Replay, trajectory: Trajectory, images: Sequence[int], weights: torch.Tensor | None = None
    ) -> None:
        self.replay, self.trajectory, self.images = replay, trajectory, list(images)
        self.goals = trajectory.latents[:, self.images]
        channels = by_channel(self.goals[0]).shape[1]
        self.weights = torch.ones(channels) if weights is None else weights / weights.mean()
        self._kept: OrderedDict[tuple[int, ...], tuple[Seen, tuple[torch.Tensor, ...]]] = OrderedDict()

    def run(self, nodes: Sequence[int]) -> Rolled:
        """Evaluate at these nodes, the first of which is 0, and fit every jump on the way."""
        nodes, trajectory = tuple(nodes), self.trajectory
        known = next((n for n in range(len(nodes), 0, -1) if nodes[:n] in self._kept), 0)
        seen, weights = self._kept.get(nodes[:known], (Seen(), ()))
        for n in range(known, len(nodes)):
            x = self.goals[0]
            if n:
                weights = (*weights, self._jump(seen, nodes[n - 1], nodes[n]))
                x = mixed(weights[-1], seen.features)
            seen = self.evaluated(seen, x, nodes[n])
            self._keep(nodes[: n + 1], (seen, weights))
        weights = (*weights, self._jump(seen, nodes[-1], len(trajectory)))
        result = mixed(weights[-1], seen.features)
        return Rolled(nodes, weights, result, self.decibels(result))

    def follow(self, nodes: Sequence[int], weights: Sequence[torch.Tensor]) -> Rolled:
        """The same with weights that are given."""
        seen, x = Seen(), self.goals[0]
        for node, jump in zip(nodes, weights, strict=True):
            seen = self.evaluated(seen, x, node)
            x = mixed(jump, seen.features)
        return Rolled(tuple(nodes), tuple(weights), x, self.decibels(x))

    def evaluated(self, seen: Seen, x: torch.Tensor, node: int) -> Seen:
        """With an evaluation at these latents."""
        own = self.trajectory
        v = self.replay(x, own.times[node], self.images)
        return seen.then(converted("sample", own.kind, v, x, own.alphas[node], own.sigmas[node]), x)

    def decibels(self, result: torch.Tensor) -> torch.Tensor:
        """PSNR of each image in its latents, up to a constant: (N,)."""
        error = by_channel(result - self.goals[-1]).pow(2).mean(2) @ self.weights.to(result.dtype)
        return -10 * torch.log10((error / len(self.weights)).clamp(min=CEILING)).double()

    def _jump(self, seen: Seen, start: int, end: int) -> torch.Tensor:
        return fitted(seen.features, self.goals[end], seen.centre(self.trajectory, start, end), self.trajectory.alike)

    def _keep(self, nodes: tuple[int, ...], state: tuple[Seen, tuple[torch.Tensor, ...]]) -> None:
        self._kept[nodes] = state
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
