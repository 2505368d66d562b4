"""How much work every stage of quantizing does: as asked, or cut down to the time there is."""

from __future__ import annotations

import time
from typing import Any

import torch

from .calibration import CalibrationSet
from .draft import Drafts, rounding
from .finetune import stage_one_epochs
from .reconstruct import RoundingSettings, units
from .settings import QuantizeSettings

_WEIGHTS = {"rounding": 0.5, "time": 0.1, "stage two": 0.4}  # shares of the time, where it does not do for all


def plan_work(
    settings: QuantizeSettings, denoiser: Any, drafts: Drafts, calibration: CalibrationSet, seconds: float | None
) -> dict[str, Any]:
    """Iterations of every stage, and the seconds that they are expected to take.

    Args:
        seconds: how long it may take from now on; None: as long as what was asked for takes.
    """
    r, f = settings.rounding, settings.finetune
    plan: dict[str, Any] = {"iterations": r.iterations if r else 0, "epochs": f.epochs if f else 0}
    plan["time_epochs"] = list(f.time_epochs) if f else [0, 0, 0]
    plan["rate"] = r.rate if r else 0.0
    costs = _costs(settings, denoiser, drafts, calibration)
    if seconds is not None:
        share = shares({k: costs[k] for k in _WEIGHTS}, max(0.0, seconds - costs["fixed"]))
        plan["iterations"] = int(plan["iterations"] * share["rounding"])
        plan["time_epochs"] = [int(n * share["time"]) for n in plan["time_epochs"]]
        plan["epochs"] = int(plan["epochs"] * share["stage two"])
    if r is not None and plan["iterations"]:  # fewer steps must go further; Adam's way is rate x steps
        plan["rate"] = min(1e-2, r.rate * max(1.0, 0.1 * RoundingSettings.iterations / plan["iterations"]))
    plan["seconds"] = {
        "fixed": costs["fixed"],
        "rounding": costs["rounding"] * plan["iterations"] / max(1, r.iterations if r else 0),
        "finetuning": (costs["time"] * sum(plan["time_epochs"]) / max(1, sum(f.time_epochs)) if f else 0.0)
        + (costs["stage two"] * plan["epochs"] / max(1, f.epochs) if f else 0.0),
    }
    return plan


def progress_of(plan: dict[str, Any], stage: str, within: float) -> tuple[float, float]:
    """Share of everything done and seconds left when `within` (0 … 1) of a stage is done."""
    planned = plan["seconds"]
    length = {"rounding": planned["rounding"], "ranges": planned["fixed"], "finetuning": planned["finetuning"]}
    before = dict(zip(length, (0.0, planned["rounding"], planned["rounding"] + planned["fixed"]), strict=True))
    total = max(1e-9, sum(length.values()))
    done = before[stage] + within * length[stage]
    return min(1.0, done / total), max(0.0, total - done)


def shares(wanted: dict[str, float], seconds: float) -> dict[str, float]:
    """How much of each stage fits: half of the time is for rounding, a tenth for stage 1, the rest for stage 2, and
    what one does not need the others get."""
    share = {k: 1.0 for k in wanted}
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


def _costs(settings: QuantizeSettings, denoiser: Any, drafts: Drafts, calibration: CalibrationSet) -> dict[str, float]:
    """Seconds of every stage as asked for, from the measured time of the denoiser."""
    rows = calibration.sample(0, 8, 0)
    rounding(drafts, False, False)
    took = []
    with torch.no_grad():
        for _ in range(3):
            began = time.monotonic()
            rows.run(denoiser)
            took.append(time.monotonic() - began)
    row, buckets = min(took) / len(rows), len(calibration.timesteps)
    r, f = settings.rounding, settings.finetune
    fixed = buckets * settings.observation.rows * row * 4 if settings.activation_bits else 0.0
    costs = {"fixed": fixed, "rounding": 0.0, "time": 0.0, "stage two": 0.0}
    if r is not None:
        kinds = len(units(denoiser, rows))
        costs["fixed"] += kinds * r.rows * row * 1.2
        costs["rounding"] = r.iterations * (min(r.batch, r.rows) * row * 4 + 0.001 * kinds)
    if f is not None:
        step = row * (6 if f.layer_loss else 5)
        times = enumerate(calibration.timesteps)
        costs["time"] = sum(stage_one_epochs(f, i, t) for i, t in times) * f.time_rows * step
        costs["stage two"] = f.epochs * buckets * f.rows * step
    return costs
