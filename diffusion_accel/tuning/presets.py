"""Presets beside a tuned plan: what anybody can have without a search, the most promising ones first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from diffusion_accel.reuse.plan import Plan, Step, bounded
from diffusion_accel.reuse.preset import Preset
from diffusion_accel.reuse.recorded import forecasts_of, influence
from diffusion_accel.reuse.search import Forecasts, Rule, predicted_error

from .replay import Recording

ORDERS = (0, 1, 2)
DAMPED = 0.5  # of the way from a forecast of one order less
IMAGES, VALUES = 8, 2**14  # of which errors are predicted, and of each as many numbers


def presets(recording: Recording, most: int) -> list[Plan]:
    """Plans of evenly spaced full steps that compute at most so many, `hold:N@ORDER` of every interval and order and
    damped ones, the one of the smallest predicted error first.

    Args:
        recording: of the baseline, at every step.
        most: full steps.
    """
    if len(set(recording.times)) < len(recording.times):
        return []  # a solver that repeats timesteps, between which nothing can be forecast
    step = -(-recording.result[0].numel() // VALUES)
    predictions, inputs = (
        part[:, :IMAGES].flatten(2)[..., ::step].float() for part in (recording.predictions, recording.latents)
    )
    scheduler, times = recording.scheduler, recording.times
    gains = influence(scheduler, predictions, inputs, times)
    own = forecasts_of(scheduler, predictions, inputs, times, gains)[:1]  # of the predictions themselves
    return sorted(_presets(own[0], most), key=lambda plan: predicted_error(plan, own))


def _presets(own: Forecasts, most: int) -> Iterator[Plan]:
    total = len(own.times)
    for interval in range(-(-total // most), total + 1):
        for order in ORDERS:
            plan = Preset("hold", interval, order=order).for_steps(total)
            yield plan
            if order:
                yield damped(plan, own)


def damped(plan: Plan, own: Forecasts) -> Plan:
    """A plan of forecast steps, each half of the way from the forecast of one order less."""
    steps: list[Step] = []
    nodes: tuple[int, ...] = ()
    for i, step in enumerate(plan.steps):
        if step.mode == "full":
            nodes = (i, *nodes)
            steps.append(step)
            continue
        count = min(step.order + 1, len(nodes))
        shares = np.zeros(count)
        for values, part in ((count, DAMPED), (max(1, count - 1), 1 - DAMPED)):
            shares[:values] += part * own.weights(nodes[:values], [i], Rule(values))[0]
        steps.append(replace(step, weights=tuple(bounded(float(share)) for share in shares)))
    return Plan(tuple(steps))
