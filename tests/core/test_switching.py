"""Whatever is switched on, off and otherwise, in whatever order: with all of it off the pipeline is what it was."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from laws import Stop, stop_at, traces
from pairs import KINDS, PARTS, Case, transparency

from diffusion_accel import (
    Compiled,
    ControlNetParallel,
    EncoderReuse,
    LatentTransparency,
    PatchParallel,
    Reuse,
    TaskRouting,
    accelerate,
)
from diffusion_accel.errors import AccelerationError

SEEDS = [seed if seed < 6 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(200)]
TINY = [kind for kind in KINDS if not kind.startswith("sticker")]


def settings(kind: str) -> list[Any]:
    """Features, each in several settings; what a pipeline does not take is refused."""
    plans = ("full", "hold:2", "hold:2@1", "deepcache:2", "shallow:2,1", "faster-diffusion", "first-block:0.2", "auto")
    found: list[Any] = [Reuse(plan=plan) for plan in plans]
    found += [Reuse(plan="hold:2", guidance="reuse:2"), Reuse(plan="steps:full full hold:sample=1.5,-0.5")]
    found += [EncoderReuse(schedule=keys) for keys in ("all", "uniform:2", (0, 1))]
    found += [EncoderReuse(batch_decoder=False, prior_noise=0.02), TaskRouting(beta=0.5, untrained=True)]
    found += [TaskRouting(untrained=True), TaskRouting.neutral(), PatchParallel(), ControlNetParallel()]
    found += [Compiled(engine="eager"), Compiled(engine="eager", parts="vae"), LatentTransparency.neutral()]
    return found + [LatentTransparency(weights=transparency(kind), views=1, strength=s) for s in (1.0, 0.5)]


@functools.cache
def case(kind: str) -> tuple[Case, torch.Tensor]:
    """One for all sequences, and what it draws plainly."""
    made = Case(kind)
    return made, made.draw()


def steps_of(chance: random.Random, one: Case) -> int:
    """Any number of steps, where no solver is for one number."""
    return one.steps if "learned" in one.others else chance.randint(2, 4)


def change(chance: random.Random, one: Case) -> None:
    """One thing is switched on, off, or otherwise; or an image is drawn, perhaps not to its end."""
    others = [name for name, part in PARTS.items() if part.setting is None]
    handle = getattr(one.pipe, "acceleration", None)
    have = list(handle.features) if handle is not None else []
    match chance.choice(["features", "features", "features", "other", "disable", "enable", "remove", "draw", "stop"]):
        case "features":
            accelerate(one.pipe, *chance.sample(settings(one.kind), chance.randint(1, 2)))
        case "other":
            name = chance.choice(others)
            first = {"lora": (), "learned": ()}.get(name, ("quantized", "inputs", "lora"))  # one at a time
            if name in one.others:
                if name in ("quantized", "inputs") and "lora" in one.others:  # which stays on the model otherwise
                    one.off("lora")
                one.off(name)
            elif not set(first) & set(one.others):
                one.on(name)
        case "draw":
            one.draw(steps=steps_of(chance, one))
        case "stop":
            if "callback_on_step_end" in type(one.pipe).__call__.__wrapped__.__code__.co_varnames:
                one.draw(steps=steps_of(chance, one), callback_on_step_end=stop_at(chance.randint(0, 1), Stop))
        case what if have:
            getattr(handle, what)(*chance.sample(have, chance.randint(0, len(have))))
        case _:
            pass


@pytest.mark.parametrize("seed", SEEDS)
def test_with_everything_off_the_pipeline_is_plain(seed: int) -> None:
    chance = random.Random(seed)
    one, plain = case(TINY[seed % len(TINY)])
    base = type(one.pipe)
    for _ in range(chance.randint(4, 10)):
        try:
            change(chance, one)
        except (AccelerationError, Stop):
            pass
    for name in reversed(one.others):
        one.off(name)
    if hasattr(one.pipe, "acceleration"):
        one.pipe.acceleration.remove()
    assert type(one.pipe) is base
    assert not [trace for trace in traces(one.pipe) if not trace.endswith(": _diffusers_hook")]
    assert torch.equal(one.draw(), plain)
