"""Stock solvers at equal evaluations: what is counted, what is best, and what is written."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from diffusion_accel.bench import run

solvers = importlib.import_module("measure_solvers")  # of scripts/, which pytest's settings put on the path


def test_rows_are_every_solver_and_spacing() -> None:
    rows = list(solvers.jobs(("ddim", "dpm++"), (5, 6)))
    assert len(rows) == len(set(rows)) == 2 * (3 + 7)
    assert rows[0] == ("ddim", "leading", 5) and rows[-1] == ("dpm++", "lu", 6)


def test_the_best_of_each_number_ignores_what_failed() -> None:
    rows = [
        {"asked": 5, "solver": "a", "median": 20.0, "worst_decile": 19.0},
        {"asked": 5, "solver": "b", "median": 21.0, "worst_decile": 12.0},
        {"asked": 5, "solver": "c", "failed": "ValueError"},
        {"asked": 6, "solver": "a", "median": 22.0, "worst_decile": 20.0},
    ]
    assert {count: row["solver"] for count, row in solvers.best(rows).items()} == {5: "b", 6: "a"}
    assert {count: row["solver"] for count, row in solvers.best(rows, "worst_decile").items()} == {5: "a", 6: "a"}


def test_the_program(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "solvers.json"
    monkeypatch.setattr(run, "CONVERGED_STEPS", 6)
    monkeypatch.setattr(
        "sys.argv", ["x", "--count", "1", "--evaluations", "4", "--solvers", "ddim", "heun", "--json", str(file)]
    )
    assert solvers.main() == 0
    written = json.loads(file.read_text())
    counted = {(row["solver"], row["steps"], row["evaluations"]) for row in written["rows"]}
    assert counted == {("ddim", 4, 4.0), ("heun", 2, 3.0)}, "Heun calls the denoiser twice in all steps but the last"
    best = max(written["rows"], key=lambda row: row["median"])
    assert f"| 4 | {best['solver']},{best['spacing']} ({best['evaluations']:g}) |" in capsys.readouterr().out
