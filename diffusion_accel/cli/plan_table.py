"""Tuned plans as a table: what is in the file of a plan or a family."""

from __future__ import annotations

import json
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from diffusion_accel.io import plain
from diffusion_accel.reuse.plan_family import PlanFamily, called, load_tuned, numbers_of
from diffusion_accel.reuse.plan_file import TunedPlan

from .terminal import console, say

LIMIT = 1_000_000  # of a number in a cell; more is no measurement
COLUMNS = ("plan", "speed-up", "evaluations", "median dB", "worst decile dB", "floor dB")
FORMS = {"speedup": ".2f", "evaluations": ".0f", "psnr_median": ".1f", "psnr_worst_decile": ".1f", "psnr_floor": ".1f"}


def show_plans(text: str, as_json: bool) -> None:
    """Print what a file of tuned plans holds, and which plan is used where nothing is asked for.

    Args:
        text: "FILE.json", "FILE.json:NAME" or "tuned:NAME".
        as_json: as one JSON object.
    """
    found = load_tuned(text)
    plans = found.members if isinstance(found, PlanFamily) else (found,)
    names = found.names if isinstance(found, PlanFamily) else (found.name or "plan",)
    rows = {name: numbers_of(plan) for name, plan in zip(names, plans, strict=True)}
    solvers = found.solvers if isinstance(found, PlanFamily) else {}
    if as_json:
        kept = {name: solver.get("measured", {}) for name, solver in solvers.items()}
        whole = {"conditions": found.conditions, "plans": rows, "solvers": kept, "search": found.search}
        say(json.dumps(whole, indent=1), lines=True)
        return
    say(f"{text}: {_conditions(found)}")
    table = Table(*COLUMNS, box=SIMPLE)
    for name, numbers in rows.items():
        table.add_row(name, *(_cell(numbers[key], form) for key, form in FORMS.items()))
    for name, solver in solvers.items():
        measured = solver.get("measured", {})
        table.add_row(f"solver {name}", *(_cell(measured.get(key), form) for key, form in FORMS.items()))
    console().print(table)
    if isinstance(found, PlanFamily) and plans:
        say(f"--reuse {text} is the plan {called(found.choose())}; speedup=X or min_psnr=DB behind it choose another")
    shares = [plan.measured.get("floor_share") for plan in plans if plan.psnr_floor is not None]
    for share in shares[:1]:
        say(f"floor: what a new image of the same kind reaches in at least {_cell(share, '.0%')} of cases")


def _conditions(found: TunedPlan | PlanFamily) -> str:
    known: dict[str, Any] = found.conditions
    call = known.get("call")
    words = [plain(known.get(key, "unknown")) for key in ("denoiser", "scheduler")]
    words += [f"{plain(known['steps'])} steps"] if "steps" in known else []
    if isinstance(call, dict):
        words += [f"{key.replace('_', ' ')} {plain(value)}" for key, value in call.items()]
    return ", ".join(words)


def _cell(value: Any, form: str) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LIMIT
    return format(value, form) if number else "–"
