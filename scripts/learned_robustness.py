"""How far plans and learned solvers hold: other guidance scales, sizes, weights, starting images, and words.

A plan, or fewer steps, is compared with its baseline, DDIM with 50 steps; a solver with the converged images, beside
stock solvers of 20 evaluations. With a starting image a solver begins at the timestep of its own that the strength
says, and is compared with the converged image from that timestep.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from measuring import STICKER, head, line, numbers, short
from PIL import Image

from diffusion_accel import Reuse, accelerate
from diffusion_accel.bench.benchmark import UNSEEN
from diffusion_accel.bench.run import CONVERGED_STEPS
from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.tuning.measure import scheduling

OF = ("plans", "solver")
DATA = Path(__file__).parent / "data"
WORDS = {"known things in other words": "rephrased_prompts.txt", "unfamiliar things": "unfamiliar_prompts.txt"}
FEWER = "fewer-steps:"  # before a number of steps of the baseline's scheduler, in the place of a plan
FRESH = 1000  # of the tuner's kind of captions: where those begin that the words are compared with
EVALUATIONS = (8, 5)
STOCK = ("deis,exponential", "dpm++")
STOCK_STEPS = 20
LORA = 0.5  # how much the random one counts


@dataclass(frozen=True)
class Setting:
    """One row: what differs from the calls that everything was tuned for."""

    kind: str
    name: str
    prompts: tuple[str, ...]
    options: dict[str, Any]
    lora: float = 0.0
    strength: float | None = None


def settings(count: int) -> Iterator[Setting]:
    """All rows."""
    prompts = tuple(embedded_prompts(count, UNSEEN))
    yield Setting("tuned", "as tuned: guidance 3, 96 pixels", prompts, STICKER)
    for scale in (1.0, 2.0, 4.0, 5.0, 7.0):
        yield Setting("guidance", f"guidance {scale:g}", prompts, STICKER | {"guidance_scale": scale})
    for side in (64, 128, 160):
        yield Setting("size", f"{side} pixels", prompts, STICKER | {"height": side, "width": side})
    yield Setting("lora", "a LoRA of small random weights", prompts, STICKER, lora=LORA)
    for strength in (0.3, 0.5, 0.7, 0.9):
        yield Setting("strength", f"from an image, strength {strength}", prompts, STICKER, strength=strength)
    yield Setting("words", "captions of the tuner's kind", tuple(embedded_prompts(count, FRESH)), STICKER)
    for name, file in WORDS.items():
        typed = (DATA / file).read_text(encoding="utf-8").splitlines()
        yield Setting("words", name, tuple(typed[:count]), STICKER)


@contextmanager
def drawing(pipe: Any, setting: Setting, options: argparse.Namespace) -> Iterator[Sampler]:
    """Within this context a sampler for a setting, all its images in one call if it begins at images."""
    sampler = Sampler(pipe, setting.prompts, STOCK_STEPS, options.seed, options.batch, setting.options)
    if setting.lora:
        from peft import LoraConfig  # optional package

        torch.manual_seed(7)
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        pipe.unet.add_adapter(LoraConfig(r=4, target_modules=layers, init_lora_weights=False), "random")
        pipe.unet.set_adapters("random", weights=setting.lora)
        try:
            yield sampler
        finally:
            pipe.unet.unload_lora()
    elif setting.strength is not None:
        drawn = (sampler.images().roll(1, 0) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        images = [Image.fromarray(image) for image in drawn]
        other = StableDiffusionImg2ImgPipeline(**pipe.components)
        other.set_progress_bar_config(disable=True)
        call = setting.options | {"image": images, "strength": setting.strength}
        yield replace(sampler, pipe=other, options=call, batch=len(images))
    else:
        yield sampler


def converged(sampler: Sampler, start: float | None) -> torch.Tensor:
    """Many steps of DPM-Solver++; with an image to start from, from a timestep on."""
    own = sampler.pipe.scheduler
    set_scheduler(sampler.pipe, "dpm++")
    with scheduling(sampler.pipe, sampler.pipe.scheduler):
        if start is None:
            found = replace(sampler, steps=CONVERGED_STEPS).images()
        else:
            count = max(2, round(CONVERGED_STEPS * start / len(own)))
            times = np.unique(np.linspace(1, start, count).round().astype(int))[::-1].tolist()
            found = replace(sampler, options=sampler.options | {"timesteps": times, "strength": 1.0}).images()
    sampler.pipe.scheduler = own
    return found


def nearness(sampler: Sampler, scheduler: str, steps: int, goals: dict[float | None, torch.Tensor]) -> dict[str, Any]:
    """How near a solver comes to the converged images; `goals` keeps those by where they start."""
    own = sampler.pipe.scheduler
    set_scheduler(sampler.pipe, scheduler)
    made = replace(sampler, steps=steps)
    images, strength, start = made.images(), sampler.options.get("strength"), None
    if strength is not None:
        start = float(round(float(sampler.pipe.scheduler.timesteps[steps - min(int(steps * strength), steps)])))
    sampler.pipe.scheduler = own
    if start not in goals:
        goals[start] = converged(sampler, start)
    return {"start": start} | numbers(goals[start], images)


def changed(sampler: Sampler, setting: Setting) -> dict[str, Any]:
    """What a LoRA does to the images: how near those with it are to those without."""
    with_it = sampler.images()
    sampler.pipe.unet.disable_adapters()
    without = sampler.images()
    sampler.pipe.unet.enable_adapters()
    return {"what": "plain images without it", "setting": setting.name} | numbers(without, with_it)


def of_solver(sampler: Sampler, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the learned solver, cell by cell."""
    goals: dict[float | None, torch.Tensor] = {}
    cells = [(f"learned, {n}", options.solver, n) for n in options.sizes or EVALUATIONS]
    cells += [(f"{name}, {STOCK_STEPS}", name, STOCK_STEPS) for name in STOCK]
    return [{"what": what} | nearness(sampler, name, n, goals) for what, name, n in cells]


def of_plans(sampler: Sampler, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the plans, cell by cell."""

    pipe, sampler = sampler.pipe, replace(sampler, steps=50)
    own = pipe.scheduler
    set_scheduler(pipe, "ddim")
    plain, found = sampler.images(), []
    for plan in options.plans:
        cell = {"what": plan.rpartition("/")[2]}
        if plan.startswith(FEWER):
            found.append(cell | numbers(plain, replace(sampler, steps=int(plan.removeprefix(FEWER))).images()))
            continue
        accelerate(pipe, Reuse(plan=plan))
        found.append(cell | numbers(plain, sampler.images()))
        pipe.acceleration.remove()
    pipe.scheduler = own
    return found


def shown(cell: dict[str, Any]) -> str:
    """A cell; with the timestep at which it starts, if it starts at an image."""
    start = cell.get("start")
    return short(cell, True) + ("" if start is None else f" (from {start:.0f})")


def run(pipe: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row of both tables."""
    rows: list[dict[str, Any]] = []
    for what, measure in (("plans", of_plans), ("solver", of_solver)):
        if what not in options.of:
            continue
        first: Sequence[Any] = []
        for setting in settings(options.count):
            if options.only and not any(word == setting.kind or word in setting.name for word in options.only):
                continue
            with drawing(pipe, setting, options) as sampler:
                cells = measure(sampler, options)
                rows += [{"of": what, "setting": setting.name} | cell for cell in cells]
                if setting.lora:
                    rows.append(changed(sampler, setting))
            if not first:
                first = [cell["what"] for cell in cells]
                head("setting", *first)
            line(setting.name, *map(shown, cells))
            if setting.lora:
                print(f"({setting.name} moves the plain images to {short(rows[-1])} dB)", flush=True)
    return rows
