"""Tuned plans and learned solvers as a table: what is in the file of a plan, a family or a solver."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from diffusion_accel.io import plain
from diffusion_accel.reuse.plan_family import PlanFamily, called, load_tuned, numbers_of
from diffusion_accel.reuse.plan_file import TunedPlan
from diffusion_accel.schedulers.in_family import apart
from diffusion_accel.schedulers.solver import evaluations_in, read_file

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
    _add_solvers(table, solvers)
    console().print(table)
    if isinstance(found, PlanFamily) and plans:
        say(f"--reuse {text} is the plan {called(found.choose())}; speedup=X or min_psnr=DB behind it choose another")
    _say_towards(solvers)
    shares = [plan.measured.get("floor_share") for plan in plans if plan.psnr_floor is not None]
    for share in shares[:1]:
        say(f"floor: what a new image of the same kind reaches in at least {_cell(share, '.0%')} of cases")


def show_solver(path: Path, as_json: bool) -> None:
    """Print what a saved learned solver holds.

    Args:
        path: its folder or file.
        as_json: as one JSON object.

    Raises:
        ConfigurationError: it is none, or damaged.
    """
    evaluations_in(path)
    solvers = apart(read_file(path))
    if as_json:
        say(json.dumps({"file": str(path), "solvers": {n: s["measured"] for n, s in solvers.items()}}), lines=True)
        return
    say(f"{path}: a solver for --scheduler {path} with --steps {' or '.join(solvers)}")
    table = Table(*COLUMNS, box=SIMPLE)
    _add_solvers(table, solvers)
    console().print(table)
    _say_towards(solvers)


def _add_solvers(table: Table, solvers: dict[str, Any]) -> None:
    for name, solver in solvers.items():
        measured = solver.get("measured", {})
        table.add_row(f"solver {name}", *(_cell(measured.get(key), form) for key, form in FORMS.items()))


def _say_towards(solvers: dict[str, Any]) -> None:
    """To which images the PSNR of solvers is."""
    wanted = {plain(solver.get("measured", {}).get("reference", "")) for solver in solvers.values()} - {""}
    if wanted:
        say(f"PSNR of solvers: to the images of {' and '.join(sorted(wanted))}")


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
