"""`make_fast` with stages that take no time: what it orders is real, what is searched is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from interrupted import arrive
from solvers import neutral

from diffusion_accel import PlanFamily, TunedPlan
from diffusion_accel.making import make_fast as module
from diffusion_accel.making.candidates import Judge
from diffusion_accel.model_files.names import find_model
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.quant.without_data import quantize_files
from diffusion_accel.reuse.conditions import conditions
from diffusion_accel.reuse.plan import Plan

STEPS = 6
PLANS = ("full full hold full full full", "full hold hold full hold full")
STAGES = ("quantize", "plans", "solvers", "judge", "writing")
CALL = {"steps": STEPS, "height": 16, "width": 16, "guidance_scale": 3.0}


def run(model: Path, output: Path, before: Callable[[str], Any] = lambda stage: None, **wish: Any) -> Any:
    """`make_fast` of a folder; `before` is told each stage that is really done."""
    source = find_model(str(model))
    pipe = load_pipeline(source)
    pipe.set_progress_bar_config(disable=True)
    judged = Judge.of

    def quantize(_pipe: Any, _prompts: Any, *, output: Path, source: Any, **_: Any) -> None:
        before("quantize")
        quantize_files(source.location, output, weight_bits=6, group=16)
        (output / "report.json").write_text(json.dumps({"bytes": {"checkpoint": 25, "float32": 100}}))

    def tune(pipe: Any, _prompts: Any, *, steps: int, **_: Any) -> PlanFamily:
        before("plans")
        numbers = [{"time_ratio": 1.2 + n, "psnr_median": 50.0, "psnr_worst_decile": 45.0} for n in range(len(PLANS))]
        made = zip(PLANS, numbers, strict=True)
        return PlanFamily.of([TunedPlan(Plan.parse(p), conditions(pipe, steps), n) for p, n in made], ["slow", "fast"])

    def tune_solver(pipe: Any, _prompts: Any, sizes: list[int], **_: Any) -> Any:
        before("solvers")
        return neutral(pipe.scheduler, *sizes)

    def of(self: Judge, candidate: Any, rounds: int) -> Any:
        before("judge")
        numbers, images = judged(self, candidate, min(rounds, 1))
        return {**numbers, **({"time_ratio": 2.0} if rounds else {})}, images  # the same each time

    def save_recipe(*given: Any, **named: Any) -> Any:
        before("writing")
        return saved(*given, **named)

    saved = module.save_recipe
    with (
        mock.patch.multiple(module, quantize=quantize, tune=tune, tune_solver=tune_solver, save_recipe=save_recipe),
        mock.patch.object(Judge, "of", of),
    ):
        wanted = {"min_psnr": 10.0, "max_size": 0.3, "seconds": 1000.0, "source": source, **CALL, **wish}
        return module.make_fast(pipe, ["red apple"] * 12, output, **wanted)


def stay(model: Path, output: Path, stage: str) -> None:
    """A process that comes to a stage and stays there, to be killed."""
    run(model, output, lambda reached: arrive(output.parent) if reached == stage else None)
