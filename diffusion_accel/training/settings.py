"""The settings of one run of the training loop, and where it stopped."""

from __future__ import annotations

import math
from dataclasses import dataclass

OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one run of the loop.

    Attributes:
        steps: budget in optimizer steps; the learning-rate schedule ends there.
        batch: samples per optimizer step, over all processes and micro-batches together.
        lr: peak learning rate.
        optimizer: "adamw", or "muon" for the matrices inside of blocks and AdamW for the rest, see `optimizers`.
        warmup: steps of linear warm-up.
        cooldown: share of the budget at the end in which the rate falls to 0.
        curve: "linear" or "cosine", how it falls.
        cycles: how often warm-up and fall are gone through within the budget (warm restarts).
        beta2: of AdamW; beta1 is 0.9.
        weight_decay: of both.
        clip: largest gradient norm.
        ema: decay of the averaged weights (an exponential moving average, as in Ho et al. 2020, appendix B), with the
            warm-up min(ema, (1 + step) / (10 + step)).
        seed: of data order, noise and timesteps.
        save_every: seconds between saved states.
        log_every, eval_every, grid_every: steps between log lines, evaluations and previews; 0 switches off.
        minutes: stop after so long, with the state saved; does not change the schedule. None: no limit.
        accumulation: micro-batches per step.
    """

    steps: int
    batch: int
    lr: float
    optimizer: str = "adamw"
    warmup: int = 100
    cooldown: float = 0.4
    curve: str = "linear"
    cycles: int = 1
    beta2: float = 0.99
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.998
    seed: int = 0
    save_every: float = 240.0
    log_every: int = 50
    eval_every: int = 250
    grid_every: int = 500
    minutes: float | None = None
    accumulation: int = 1

    def rate(self, step: int) -> float:
        """Learning rate of step `step` (from 0)."""
        length = self.steps / self.cycles
        place = step - length * min(self.cycles - 1, int(step / length))
        left = (length - place) / max(1.0, self.cooldown * length)
        fall = min(1.0, left)
        if self.curve == "cosine":
            fall = 0.5 * (1 - math.cos(math.pi * fall))
        return self.lr * min(1.0, (place + 1) / max(1, self.warmup)) * fall


@dataclass(frozen=True)
class Outcome:
    """Where a run stopped: after `step` steps, `finished` if that is the budget, `signal` if one stopped it."""

    step: int
    finished: bool
    signal: int | None = None
