"""`tune` with solvers: learnt and drawn with, with plans in one file, and refused before a model is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import call
from PIL import Image

import diffusion_accel
from diffusion_accel import ConfigurationError, LearnedMultistepScheduler, PlanFamily
from diffusion_accel.reuse.plan_family import load_tuned
from diffusion_accel.schedulers.solver import evaluations_in, read_file

PROMPT = "red apple, 3d style"
SMALL = ["--width", "32", "--height", "32", "-q"]
FEW = ["--count", "6", "--steps", "5", "--budget", "1", "--device", "cpu", "--towards", "baseline", *SMALL]


def drawn(capsys: Any, file: Path, *arguments: Any) -> Any:
    code, _, err = call(
        capsys, "generate", PROMPT, "--seed", "1", "--guidance-scale", "3", *arguments, *SMALL, "-o", file
    )
    assert code == 0, err
    return np.asarray(Image.open(file).convert("RGB"))


def test_a_solver_is_learnt_and_drawn_with(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "mine"
    code, out, err = call(capsys, "tune", "-o", folder, "--evaluations", "3", "--evaluations", "2", *FEW, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["file"] == str(folder) and list(found["solvers"]) == ["2", "3"]
    assert found["solvers"]["3"]["evaluations"] == 3 and found["solvers"]["3"]["pictures"] == 2
    assert found["solvers"]["3"]["towards"] == "baseline" and found["solvers"]["3"]["psnr_median"] > 10
    assert [path.name for path in tmp_path.iterdir()] == ["mine"], "no state of a search is left"
    assert [path.name for path in folder.iterdir()] == ["scheduler_config.json"]
    learned = LearnedMultistepScheduler.from_pretrained(folder)
    assert learned.evaluations == [2, 3] and learned.config.made_for["height_width"] == [[32, 32]]
    learned.save_pretrained(tmp_path / "again")
    written = [(tmp_path / name / "scheduler_config.json").read_bytes() for name in ("mine", "again")]
    assert written[0] == written[1], "as save_pretrained has it"
    assert drawn(capsys, tmp_path / "a.png", "--scheduler", folder, "--steps", "3").std() > 0
    code, out, _ = call(capsys, "inspect", folder)
    table = [line.split()[:4] for line in out.splitlines()]
    assert code == 0 and ["solver", "3", "–", "3"] in table and "5 steps" in out
    code, _, err = call(capsys, "tune", "-o", folder, "--evaluations", "3", *FEW)
    assert code == 1 and "exists; choose another name or pass --overwrite" in err
    assert (folder / "scheduler_config.json").read_bytes() == written[0]


@pytest.mark.slow
def test_plans_and_solvers_in_one_file(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "all.json"
    scales = ["--guidance-scale", "2", "--guidance-scale", "4"]
    code, out, err = call(capsys, "tune", "-o", file, "--evaluations", "2", "--evaluations", "3", *scales, *FEW)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()]
    assert sum(row[:1] == ["solver"] for row in rows) == 2 and "PSNR of solvers: to the images of" in out
    assert [path.name for path in tmp_path.iterdir()] == ["all.json"], "no state of a search is left"
    family = PlanFamily.load(str(file))
    assert family.members and list(family.solvers) == ["2", "3"] and evaluations_in(file) == [2, 3]
    assert family.conditions["call"]["guidance_scale"] == [2, 4] == read_file(file)["made_for"]["guidance_scale"]
    LearnedMultistepScheduler.from_config(read_file(file)).save_pretrained(tmp_path / "alone")
    first = drawn(capsys, tmp_path / "a.png", "--scheduler", file, "--steps", "3")
    assert np.array_equal(first, drawn(capsys, tmp_path / "b.png", "--scheduler", tmp_path / "alone", "--steps", "3"))
    fastest = family.members[-1]
    wish = f"{file},speedup={fastest.speedup}"
    planned = drawn(capsys, tmp_path / "c.png", "--reuse", wish, "--steps", "5")
    load_tuned(f"{file}:{family.names[-1]}").save(tmp_path / "plan.json")
    assert np.array_equal(planned, drawn(capsys, tmp_path / "d.png", "--reuse", tmp_path / "plan.json", "--steps", "5"))
    code, _, err = call(capsys, "generate", PROMPT, "--scheduler", file, "--steps", "5", "-o", tmp_path / "e.png")
    assert code == 2 and "learnt for 2 and 3 evaluations; the nearest to 5 is 3" in err


REFUSED: dict[str, tuple[list[str], str]] = {
    "speed-up": (
        ["-o", "s", "--evaluations", "6", "--speedup", "2"],
        "--evaluations cannot be combined with --speedup",
    ),
    "fidelity": (["-o", "s.json", "--evaluations", "6", "--min-psnr", "40"], "for a family of both"),
    "none": (["-o", "s", "--evaluations", "0"], "--evaluations must be 1 to 50, got 0"),
    "many": (["-o", "s", "--evaluations", "6", "--evaluations", "51"], "--evaluations must be 1 to 50, got 51"),
    "towards": (["-o", "s", "--evaluations", "6", "--towards", "truth"], "--towards must be converged or baseline"),
    "towards alone": (["-o", "s.json", "--towards", "baseline"], "--towards needs --evaluations"),
    "more than the baseline": (
        ["-o", "s", "--evaluations", "6", "--steps", "5", "--towards", "baseline"],
        "the baseline's 5 steps, so --evaluations must be at most that, got 6",
    ),
    "few steps": (["-o", "s.json", "--speedup", "2", "--steps", "3"], "--steps must be at least 4, got 3"),
    "few prompts": (["-o", "s", "--evaluations", "6", "--prompts-file", "three.txt"], "at least 6 prompts"),
    "other steps": (["-o", "s.json", "--try-steps", "10"], "--try-steps and --try-scheduler need --speedup"),
    "other schedulers": (["-o", "s", "--evaluations", "6", "--try-scheduler", "ddim"], "need --speedup or --min-psnr"),
    "a folder of plans": (["-o", "s"], "--output must end in .json, got s"),
    "scheduler": (["-o", "s", "--evaluations", "6", "--scheduler", "none.json"], "none.json cannot be read"),
    "search": (["-o", "damaged", "--evaluations", "6"], "line 1 of the search damaged.search"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_model_is_loaded(
    case: str, no_model: None, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("damaged.search").write_text("{{\n")
    Path("three.txt").write_text("a\nb\nc\n")
    arguments, says = REFUSED[case]
    code, out, err = call(capsys, "tune", *arguments)
    assert code == 2 and not out and err.count("\n") == 1
    assert says in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.search", "three.txt"]


def test_a_file_where_a_folder_is_needed(no_model: None, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "s").touch()
    code, _, err = call(capsys, "tune", "-o", tmp_path / "s", "--evaluations", "6")
    assert code == 1 and "is a file; a solver needs a folder" in err


@pytest.mark.parametrize(("given", "expected"), [([], (300.0, None)), (["--budget", "20m"], (1200.0, math.inf))])
def test_a_time_that_is_named_is_used_whole(
    given: list[str], expected: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself the search of a family ends with its work, long before so much time."""
    asked: list[Any] = []

    def tune(*_: Any, seconds: float, images: float | None, **__: Any) -> None:
        asked.append((seconds, images))
        raise ConfigurationError("no more of it")

    monkeypatch.setattr(diffusion_accel, "tune", tune)
    code, _, err = call(capsys, "tune", "-o", tmp_path / "a.json", "--count", "6", "--device", "cpu", *given, "-q")
    assert code == 2 and "no more of it" in err
    assert asked == [expected]
