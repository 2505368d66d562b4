"""Learning a solver: what is refused, and that an interrupted search keeps its rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import HeunDiscreteScheduler

from diffusion_accel import ConfigurationError, tune_solver
from diffusion_accel.tuning import jumps
from diffusion_accel.tuning.solver import distinct
from diffusion_accel.tuning.state import read_search

PROMPTS = [f"{name}, {style} style" for name in ("red apple", "panda", "rocket") for style in ("3d", "flat")]
CALL = {"steps": 5, "towards": "baseline", "guidance_scale": 3.0, "height": 32, "width": 32}


def test_rollouts_are_kept_and_not_made_again(sticker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, made = jumps.Jumps.run, []

    def watched(self: Any, nodes: Any) -> Any:
        made.append((tuple(nodes), len(self.images)))
        return run(self, nodes)

    monkeypatch.setattr(jumps.Jumps, "run", watched)
    state = tmp_path / "s.search"
    first = tune_solver(sticker, PROMPTS, 2, seconds=0, state=state, **CALL)
    head, known = read_search(state)
    assert head["method"] == "solver" and head["prompts"] == PROMPTS[:4]
    assert [*known] == ["rollout 0,2"] and len(made) == 2, "one rollout, and the fit of the solver itself"
    again = tune_solver(sticker, PROMPTS, 2, seconds=0, state=state, **CALL)
    assert len(made) == 3 and read_search(state) == (head, known)
    assert dict(again.config.solvers) == dict(first.config.solvers)
    tune_solver(sticker, PROMPTS, 2, seconds=0, state=state, **{**CALL, "seed": 1})
    assert len(made) == 5, "another search begins anew"


def test_no_timestep_is_evaluated_twice() -> None:
    heun = HeunDiscreteScheduler()
    heun.set_timesteps(4)
    times = [float(t) for t in heun.timesteps]
    assert len(times) == 7 and distinct(times) == [0, 2, 4, 6], "the corrected latents, not the predicted ones"
    assert distinct([900.0, 500.0, 499.9995, 3.0]) == [0, 2, 3]


def test_what_cannot_be_learnt_is_refused(sticker: Any) -> None:
    for values, words in (
        ({"evaluations": 6}, "towards the baseline of 5 steps at most 5 evaluations, got 6"),
        ({"evaluations": []}, "a number or several, got none"),
        ({"evaluations": 51, "towards": "converged"}, "evaluations must be a whole number"),
        ({"evaluations": 2, "towards": "truth"}, "towards must be one of converged, baseline"),
        ({"evaluations": 2, "prompts": PROMPTS[:5]}, "at least 6 prompts"),
        ({"evaluations": 2, "state": 3}, "state must be a text or a path"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            tune_solver(sticker, **{"prompts": PROMPTS, **CALL, **values})
