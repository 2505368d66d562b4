"""Fitted weights made better by trying them: Gauss-Newton on what the images themselves say.

Weights that are fitted to the baseline's predictions do not know that the computed steps answer to the errors of the
held ones before them. The images do: they are nearly linear in a small change of the weights, so a few calls say
where to go, without a gradient of the denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch

from diffusion_accel.reuse.history import weights
from diffusion_accel.reuse.plan import Plan, Step, bounded

STEP = 0.01
DAMPING = (0.01, 0.1, 1.0)


def with_weights(plan: Plan, times: list[float]) -> Plan:
    """The plan with the weights of every held step written out, those of polynomials too."""
    steps: list[Step] = []
    nodes: list[int] = []
    for i, step in enumerate(plan.steps):
        if step.mode == "full":
            nodes.insert(0, i)
        if step.mode == "hold" and not step.weights:
            used = nodes[: step.order + 1]
            shares = weights([times[n] for n in used], times[i])
            step = replace(step, order=len(used) - 1, weights=tuple(map(bounded, shares)))
        steps.append(step)
    return Plan(tuple(steps))


def adjustable(plan: Plan) -> list[tuple[range, int]]:
    """What is adjusted: (steps, place), the weight at this place of a run of held steps in the same space."""
    found: list[tuple[range, int]] = []
    for (mode, _, count), group in groupby(
        range(len(plan)), lambda i: (plan.steps[i].mode, plan.steps[i].space, len(plan.steps[i].weights))
    ):
        run = list(group)
        if mode == "hold":
            found += [(range(run[0], run[-1] + 1), place) for place in range(count)]
    return found


def moved(plan: Plan, places: list[tuple[range, int]], by: np.ndarray) -> Plan:
    """The plan with each of the weights that `adjustable` names changed by an amount."""
    steps = list(plan.steps)
    for (run, place), change in zip(places, by, strict=True):
        for i in run:
            values = list(steps[i].weights)
            values[place] = round(bounded(values[place] + float(change)), 4)
            steps[i] = replace(steps[i], weights=tuple(values))
    return Plan(tuple(steps))


def fit_weights(
    plan: Plan, draw: Callable[[Plan], torch.Tensor], wanted: torch.Tensor, go_on: Callable[[], bool]
) -> Plan | None:
    """One Gauss-Newton step on the weights of a plan that has them; None if time ran out or nothing was gained.

    The objective is the mean over the images of the logarithm of their squared error, as a mean PSNR is.

    Args:
        plan: see `with_weights`.
        draw: the images that a plan makes, (N, …).
        wanted: the images of the baseline.
        go_on: asked before each call of `draw`.
    """
    places = adjustable(plan)
    if not places or not go_on():
        return None
    residual = (draw(plan) - wanted).flatten(1)
    sizes = residual.pow(2).mean(1, keepdim=True).sqrt().clamp(min=1e-5)
    slopes = []
    for n in range(len(places)):
        if not go_on():
            return None
        other = moved(plan, places, STEP * np.eye(len(places))[n])
        slopes.append((((draw(other) - wanted).flatten(1) - residual) / STEP / sizes).flatten().double())
    jacobian = torch.stack(slopes).numpy()
    normal, gradient = jacobian @ jacobian.T, jacobian @ (residual / sizes).flatten().double().numpy()
    best, least = None, float(sizes.log().mean())
    for damping in DAMPING:
        if not go_on():
            break
        step = np.linalg.lstsq(normal + damping * np.diag(np.diag(normal) + 1e-12), gradient, rcond=None)[0]
        other = moved(plan, places, -step)
        error = float((draw(other) - wanted).flatten(1).pow(2).mean(1).sqrt().clamp(min=1e-5).log().mean())
        if error < least:
            best, least = other, error
    return best
