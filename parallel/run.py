"""What the hooks of one pipeline call share: who has which rows, which step is exact, and the messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from diffusion_accel.errors import CallStateError

from .communicator import Communicator
from .forecast import Forecaster
from .geometry import Level, Split
from .group import World


class Clock(Protocol):
    """The part of `StepClock` that this needs."""

    index: int
    call: int


class PatchRun:
    """One pipeline call on a world of processes.

    Attributes:
        mode: "sync", "displaced", "partial" or "naive".
        warmup: how many steps at the beginning are exact.
        fraction: of the neighbours' keys and values that "partial" uses.
        group_norm: "corrected", "stale", "sync" or "local" statistics at steps that are not exact.
        split: of the pass that is running; None between passes, or if this process has the whole image.
        exact: whether the running pass waits for fresh values of the others.
        visited: which visit of a layer exchanged something last.
    """

    def __init__(
        self,
        world: World,
        clock: Clock,
        communicator: Communicator,
        mode: str,
        warmup: int,
        fraction: float,
        group_norm: str,
        forecast: bool = False,
    ) -> None:
        self.world, self.clock, self.communicator = world, clock, communicator
        self.mode, self.warmup, self.fraction, self.group_norm = mode, warmup, fraction, group_norm
        self._forecaster = Forecaster() if forecast else None
        self.split: Split | None = None
        self.exact = True
        self.visited: Any = None
        self.peers: tuple[int, ...] = ()  # ranks by part
        self.counters: Counter[str] = Counter()
        self._visits: Counter[str] = Counter()
        self._scope = ""
        self._keeps = False

    # ------------------------------------------------------------------ one pass through a model
    @contextmanager
    def running(
        self, scope: str, split: Split | None, peers: tuple[int, ...], exact: bool, keeps: bool = False
    ) -> Iterator[None]:
        """A pass through a model, this process having its part of `split`.

        Args:
            peers: the rank of each part.
            exact: wait for fresh values of the others.
            keeps: keep what the others send, for a step that does not wait.
        """
        before = (self.split, self.peers, self.exact, self._visits, self._scope, self._keeps)
        self.split, self.peers, self.exact, self._keeps = split, peers, exact, keeps
        self._visits, self._scope = Counter(), f"{scope}.{self.clock.call}"
        try:
            yield
        finally:
            self.split, self.peers, self.exact, self._visits, self._scope, self._keeps = before

    def stale_step(self) -> bool:
        """Whether the step that is running uses what the others sent at the step before."""
        return self.mode != "sync" and self.clock.index >= self.warmup

    @property
    def forecaster(self) -> Forecaster | None:
        """What continues the others' values; None where they are taken as they are, or never of a step before."""
        return self._forecaster if self._keeps else None

    @contextmanager
    def counted(self) -> Iterator[bool]:
        """A pass of the denoiser, and what it sends; only the first of a step counts as a step.

        Yields:
            Whether it uses what the others sent at the step before.
        """
        stale, sent = self.stale_step(), sum(self.communicator.traffic.values())
        yield stale
        kind = "stale" if stale else "exact"
        self.counters[f"{kind}_steps"] += self.clock.call == 0
        self.counters[f"{kind}_bytes"] += sum(self.communicator.traffic.values()) - sent

    def key(self, layer: str) -> tuple[str, str, int]:
        """The name of this visit of a layer, which may run several times in a pass, as a model may in a step."""
        self._visits[layer] += 1
        return self._scope, layer, self._visits[layer]

    # ------------------------------------------------------------------ resolutions
    def level(self, x: torch.Tensor, layer: str, more: int = 0) -> Level:
        """The resolution of a tensor (..., H, W), which has `more` rows and columns of padding."""
        assert self.split is not None
        extent = x.shape[-1 if self.split.dim == -2 else -2] - more
        return self._found(self.split.by_other.get(extent), layer, tuple(x.shape))

    def level_of_tokens(self, tokens: int, layer: str) -> Level:
        """The resolution of a layer over so many positions of this process."""
        assert self.split is not None
        return self._found(self.split.by_tokens.get(tokens), layer, (tokens,))

    def _found(self, level: Level | None, layer: str, shape: tuple[int, ...]) -> Level:
        if level is None:
            raise CallStateError(
                f"patch_parallel cannot tell which part of the image {layer} has (shape {shape}); "
                "this size or condition is not supported: use a multiple of 64 pixels, or switch it off"
            )
        return level

    # ------------------------------------------------------------------ exchanges with every other part
    def others(self) -> list[int]:
        """The other parts of the image."""
        assert self.split is not None
        return [part for part in range(self.split.parts) if part != self.split.part]

    def swap(
        self, what: tuple[str, str], sends: dict[int, torch.Tensor], shapes: dict[int, Any], like: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        """`Communicator.swap`, by part instead of rank."""
        ranks = self.peers
        got = self.communicator.swap(
            what, {ranks[p]: t for p, t in sends.items()}, {ranks[p]: s for p, s in shapes.items()}, like
        )
        return {part: got[ranks[part]] for part in shapes}

    def _shape(self, like: torch.Tensor) -> Any:
        assert self.split is not None
        return tuple(like.shape), like.dtype, self.split.levels[0].bounds

    def exchange(
        self,
        what: tuple[str, str],
        sends: dict[int, torch.Tensor],
        shapes: dict[int, Any],
        like: torch.Tensor,
        own: Any = None,
        later: tuple[dict[int, torch.Tensor], dict[int, Any]] | None = None,
    ) -> tuple[dict[int, torch.Tensor], Any]:
        """What the other parts have for a layer: fresh at exact steps, of the step before at the others.

        Args:
            what: kind of message and name of the layer, for the count.
            sends, shapes: by part, what this process sends, and the shapes of what it gets.
            own: what to keep of this process's own values, for who corrects those of the others by it; without it they
                are forecast, if the run forecasts.
            later: what is sent and expected at steps that are not exact, if less.

        Returns:
            What the other parts sent, and `own` of the time when it was sent (None at exact steps).
        """
        shape, ranks = self._shape(like), self.peers
        key = self.visited = (*self.key(what[1] + what[0]), shape)  # batches with and without guidance may alternate
        slot = None if self.exact else self.communicator.take(key, shape)
        if slot is None:  # an exact step, or a layer that has not run with this shape before
            got = self.swap(what, sends, shapes, like)
            if self._keeps:
                self.communicator.keep(key, shape, {ranks[p]: t for p, t in got.items()}, own)
                if self.forecaster is not None and own is None:
                    self.forecaster.note(key, got, sends)
            return got, None
        stale = {part: slot.received[ranks[part]] for part in shapes if ranks[part] in slot.received}
        if self.forecaster is not None and own is None:
            stale = self.forecaster.forecast(key, stale, sends)
        if later is not None:
            sends, shapes = later
        self.communicator.post(
            what,
            key,
            shape,
            {ranks[p]: t for p, t in sends.items()},
            {ranks[p]: s for p, s in shapes.items()},
            like,
            own,
        )
        return stale, slot.own

    # ------------------------------------------------------------------ what was sent
    def summary(self) -> dict[str, float]:
        """The counters of the call so far."""
        kinds: Counter[str] = Counter()
        for (kind, _), size in self.communicator.traffic.items():
            kinds[kind] += size
        exact, stale = self.counters["exact_steps"], self.counters["stale_steps"]
        return {
            "exact_steps": exact,
            "stale_steps": stale,
            "bytes_sent": sum(kinds.values()),
            "bytes_per_exact_step": self.counters["exact_bytes"] / max(exact, 1),
            "bytes_per_stale_step": self.counters["stale_bytes"] / max(stale, 1),
            **{f"{kind}_bytes": kinds[kind] for kind in ("halo", "norm", "attention", "output")},
            "buffer_bytes": self.communicator.buffer_bytes,
        }
