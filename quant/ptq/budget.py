"""How much work every stage of quantizing does: as asked, or cut down to the time there is."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .finetune import stage_one_epochs
from .ranges import observe
from .reconstruct import RoundingSettings, units
from .stage import Job, Part, RunState, Stage, Values
from .trainable_layer import TrainableLayers, set_quantization_state

if TYPE_CHECKING:
    from .calibration import CalibrationSet, Rows
    from .settings import QuantizeSettings

_WEIGHTS = {"rounding": 0.5, "time": 0.1, "stage two": 0.4}  # shares of the time, where it does not do for all
# at most so much of the time that is left goes into what layers need, ranges, errors after stages, and the report
_SENSITIVITY, _RANGES, _ERRORS, _REPORT = 0.2, 0.25, 0.05, 0.15
PROBE_ROWS = 16  # of a timestep, on which sensitivities and validation errors are measured
PROBE_TIMESTEPS = 10  # at most, for sensitivities; errors are measured at all
_CALIBRATION, _LEAST_PROMPTS = 0.25, 8  # of the whole time; of prompts
_LEAST_RANGE_ROWS, _LEAST_ROUNDING_ROWS = 4, 32
_ERRORS_MEASURED = 4  # times


def plan_probe(denoiser: nn.Module, heldout: CalibrationSet, layers: int, seconds: float | None) -> dict[str, int]:
    """Rows and timesteps on which the sensitivity of each layer is measured: fewer, where the time does not do.

    One row at one timestep for each layer is the least.
    """
    most = {"rows": PROBE_ROWS, "timesteps": PROBE_TIMESTEPS}
    if seconds is None:
        return most
    one, all_ = (_seconds(heldout.sample(0, count, 0), denoiser) for count in (1, PROBE_ROWS))
    allowed = _SENSITIVITY * max(0.0, seconds)
    for timesteps, rows in ((6, 16), (6, 8), (3, 8), (3, 4), (2, 4), (2, 2), (1, 2)):
        each = one + (all_ - one) * (rows - 1) / (PROBE_ROWS - 1)
        if layers * timesteps * each <= allowed:
            return {"rows": rows, "timesteps": timesteps}
    return {"rows": 1, "timesteps": 1}


def plan_prompts(count: int, each: float, seconds: float) -> int:
    """How many of `count` prompts the calibration set is drawn with.

    Args:
        each: seconds that drawing one image takes.
        seconds: of the whole budget.
    """
    return max(min(count, _LEAST_PROMPTS), min(count, int(_CALIBRATION * seconds / max(each, 1e-9))))


def plan_report(images: int, each: float, seconds: float | None, whole: float) -> tuple[int, int]:
    """How many images the report compares, and how often it times every runtime.

    Args:
        images: as asked for.
        each: seconds that drawing one image takes in full precision.
        seconds: that are left; None: as many as it takes.
        whole: seconds of the whole budget.
    """
    asked = (images, 5)
    if seconds is None or not images:
        return asked
    allowed = max(seconds, _REPORT * whole)
    for count, rounds in (asked, (min(images, 8), 3), (min(images, 4), 2), (min(images, 2), 1)):
        if each * (3 * count + 6 * (rounds + 1)) <= allowed:  # simulated images take twice as long
            return count, rounds
    return 1, 1


def plan_stages(
    settings: QuantizeSettings,
    denoiser: nn.Module,
    layers: TrainableLayers,
    calibration: CalibrationSet,
    seconds: float | None,
) -> dict[str, Any]:
    """Iterations of every stage, and the seconds that they are expected to take.

    Args:
        seconds: how long it may take from now on; None: as long as what was asked for takes.
    """
    r, f = settings.rounding, settings.finetune
    plan: dict[str, Any] = {"iterations": r.iterations if r else 0, "epochs": f.epochs if f else 0}
    plan["time_epochs"] = list(f.time_epochs) if f else [0, 0, 0]
    plan["rate"] = r.rate if r else 0.0
    plan |= {"error_rows": PROBE_ROWS, "range_rows": settings.observation.rows, "rounding_rows": r.rows if r else 0}
    costs = _costs(settings, denoiser, layers, calibration, seconds is not None)
    if seconds is not None:
        seconds = max(0.0, seconds) * (1 - _REPORT)
        for what, share_of_it, least in (("error", _ERRORS, 1), ("range", _RANGES, _LEAST_RANGE_ROWS)):
            key = f"{what}_rows"
            plan[key] = max(min(plan[key], least), min(plan[key], int(share_of_it * seconds / costs[key])))
        left = max(0.0, seconds - sum(plan[key] * costs[key] for key in ("error_rows", "range_rows")))
        share = shares({k: costs[k] for k in _WEIGHTS}, left)
        if r is not None:  # what blocks are given is recorded before they learn: at most a third of their time
            time_for_it = min(left, share["rounding"] * costs["rounding"])
            rows = min(r.rows, int(time_for_it / 3 / costs["rounding_rows"]))
            plan["rounding_rows"] = rows
            within = max(0.0, 1 - rows * costs["rounding_rows"] / max(1e-9, time_for_it))
            share["rounding"] = within * share["rounding"] if rows >= min(r.rows, _LEAST_ROUNDING_ROWS) else 0.0
        plan["iterations"] = int(plan["iterations"] * share["rounding"])
        plan["time_epochs"] = [int(n * share["time"]) for n in plan["time_epochs"]]
        plan["epochs"] = int(plan["epochs"] * share["stage two"])
    if r is not None and plan["iterations"]:  # fewer steps must go further; Adam's way is rate x steps
        plan["rate"] = min(1e-2, r.rate * max(1.0, 0.1 * RoundingSettings.iterations / plan["iterations"]))
    plan["seconds"] = {
        "fixed": plan["range_rows"] * costs["range_rows"] + plan["error_rows"] * costs["error_rows"],
        "rounding": costs["rounding"] * plan["iterations"] / max(1, r.iterations if r else 0),
        "finetuning": (costs["time"] * sum(plan["time_epochs"]) / max(1, sum(f.time_epochs)) if f else 0.0)
        + (costs["stage two"] * plan["epochs"] / max(1, f.epochs) if f else 0.0),
    }
    return plan


def shares(wanted: dict[str, float], seconds: float) -> dict[str, float]:
    """How much of each stage fits: half of the time is for rounding, a tenth for stage 1, the rest for stage 2, and
    what one does not need the others get."""
    share = dict.fromkeys(wanted, 1.0)
    open_, left = {k for k in wanted if wanted[k] > 0}, seconds
    while open_:
        whole = sum(_WEIGHTS[k] for k in open_)
        fits = {k for k in open_ if wanted[k] <= left * _WEIGHTS[k] / whole}
        if not fits:
            for k in open_:
                share[k] = left * _WEIGHTS[k] / whole / wanted[k]
            break
        left -= sum(wanted[k] for k in fits)
        open_ -= fits
    return share


def _costs(
    settings: QuantizeSettings, denoiser: nn.Module, layers: TrainableLayers, calibration: CalibrationSet, exactly: bool
) -> dict[str, float]:
    """Seconds of every stage as asked for, from the measured time of the denoiser; of what is measured on rows
    ("…_rows"), seconds for each row of every timestep.

    `exactly`: watch ranges for a moment instead of estimating how long that takes.
    """
    rows = calibration.sample(0, 8, 0)
    set_quantization_state(layers, weights=False, inputs=False)
    row, buckets = _seconds(rows, denoiser) / len(rows), len(calibration.timesteps)
    r, f = settings.rounding, settings.finetune
    costs = {"rounding": 0.0, "time": 0.0, "stage two": 0.0, "rounding_rows": 1e-9, "range_rows": 1e-9}
    costs["error_rows"] = _ERRORS_MEASURED * buckets * row
    if settings.activation_bits:
        costs["range_rows"] = buckets * (
            _range_seconds(settings, denoiser, layers, calibration) if exactly else 4 * row
        )
    if r is not None:
        kinds = len(units(denoiser, rows))
        costs["rounding_rows"] = kinds * row * 1.2
        costs["rounding"] = r.iterations * (min(r.batch, r.rows) * row * 4 + 0.001 * kinds)
    if f is not None:
        step = row * (6 if f.layer_loss else 5)
        times = enumerate(calibration.timesteps)
        costs["time"] = sum(stage_one_epochs(f, i, t) for i, t in times) * f.time_rows * step
        costs["stage two"] = f.epochs * buckets * f.rows * step
    return costs


def _seconds(rows: Rows, denoiser: nn.Module) -> float:
    """The least time that the denoiser takes for some rows."""
    took = []
    with torch.no_grad():
        for _ in range(3):
            began = time.monotonic()
            rows.run(denoiser)
            took.append(time.monotonic() - began)
    return min(took)


def _range_seconds(
    settings: QuantizeSettings, denoiser: nn.Module, layers: TrainableLayers, calibration: CalibrationSet
) -> float:
    """Seconds for a row of watching ranges. The grids that it finds are found anew later."""
    watch = dataclasses.replace(settings.observation, rows=_LEAST_RANGE_ROWS)
    set_quantization_state(layers, weights=True, inputs=False)
    began = time.monotonic()
    observe(denoiser, layers, calibration, watch, [0], {})
    set_quantization_state(layers, weights=False, inputs=False)
    return (time.monotonic() - began) / _LEAST_RANGE_ROWS


# ---------------------------------------------------------------------- the stages
def _count_prompts(state: RunState, _job: Job) -> Values:
    """How many prompts the time for drawing the calibration set allows."""
    state.tell("how long an image takes")
    began = time.monotonic()
    with torch.no_grad():
        state.sampler.call(0, 1)
    assert state.minutes is not None
    return {"prompts": plan_prompts(len(state.sampler.prompts), time.monotonic() - began, 60 * state.minutes)}


def _cut_prompts(state: RunState, _part: Part, values: Values) -> None:
    count, asked = int(values["prompts"]), len(state.sampler.prompts)
    if count < asked:
        state.tell(f"calibration on {count} of {asked} prompts")
        state.sampler = state.sampler.part(0, count)


def _plan(state: RunState, _job: Job) -> Values:
    return plan_stages(state.settings, state.denoiser, state.trainable, state.calibration, state.left())


def _take_plan(state: RunState, _part: Part, values: Values) -> None:
    state.plan = values


# decided once, and written down for a run that goes on
PROMPTS = Stage("calibration", _count_prompts, _cut_prompts, "prompts.json", wanted=lambda s: s.minutes is not None)
PLAN = Stage("", _plan, _take_plan, "plan.json", error="nearest, weights only")
