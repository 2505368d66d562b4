"""Neighbours of a plan, for the hill climbing of the tuner."""

from __future__ import annotations

import random
from dataclasses import replace

from diffusion_accel.reuse.plan import FULL, Plan, Step
from diffusion_accel.reuse.search import Rule

from .measure import CONDITIONAL

RULES = (Rule(1), Rule(2), Rule(3), Rule(4), Rule(1, True), Rule(2, True), Rule(3, True))


def guidance_thinned(plan: Plan, every: int) -> Plan:
    """The plan with guidance's unconditional branch at each `every`-th of its full steps only."""
    number = -1
    steps = []
    for step in plan.steps:
        number += step.mode == "full"
        steps.append(CONDITIONAL if step.mode == "full" and number % every else step)
    return Plan(tuple(steps))


def neighbour(plan: Plan, rng: random.Random, guided: bool, spaces: tuple[str, ...] = ("",)) -> Plan:
    """A plan that is nearly the same: full steps moved, exchanged or traded, another rule behind one of them, another
    branch kept.

    Fitted weights are not fitted to it yet.
    """
    steps = list(plan.steps)
    for _ in range(rng.choice((1, 1, 2))):
        nodes = [i for i, step in enumerate(steps) if step.mode == "full" and i]
        held = [i for i, step in enumerate(steps) if step.mode == "hold"]
        if not nodes or not held:
            return plan
        move = rng.random()
        node = rng.choice(nodes)
        if move < 0.55:  # move a full step a little
            to = node + rng.choice((-2, -1, -1, 1, 1, 2))
            if 0 < to < len(steps) and steps[to].mode == "hold":
                steps[node], steps[to] = steps[to], steps[node]
        elif move < 0.75:  # another order and space of the run behind a full step
            start = rng.choice([0, *nodes])
            rule, space = rng.choice(RULES), rng.choice(spaces)
            end = next((i for i in nodes if i > start), len(steps))
            steps[start + 1 : end] = [rule.hold(space, (0.0,) * rule.count)] * (end - start - 1)
        elif move < 0.85 or not guided:  # take a full step away here, put it in there
            to = rng.choice(held)
            steps[node], steps[to] = steps[to], steps[node]
        elif steps[node].guidance == "both":  # give a branch away, and gain a step without it
            conditional = replace(CONDITIONAL, order=rng.choice((0, 1)))
            steps[node] = steps[rng.choice(held)] = conditional
        else:
            steps[node] = FULL
            others = [i for i in nodes if steps[i].guidance == "reuse" and i != node]
            if others:
                steps[rng.choice(others)] = Step("hold", space=rng.choice(spaces), weights=(0.0,))
    return Plan(tuple(steps))
