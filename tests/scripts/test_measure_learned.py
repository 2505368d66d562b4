"""What each part of the tuner is worth: with all parts it is the tuner, with none plain holding."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo

from diffusion_accel.prediction import Conversion
from diffusion_accel.reuse.plan import FULL, Step
from diffusion_accel.tuning.error_feedback import Rollout
from diffusion_accel.tuning.jumps import Trajectory
from diffusion_accel.tuning.recording import record
from diffusion_accel.tuning.replay import Recording, Replay

parts = importlib.import_module("learned_parts")  # of scripts/, which pytest's settings put on the path
robustness = importlib.import_module("learned_robustness")
STEPS, IMAGES = 6, 4


class Calls:
    """What `record` needs of a sampler, for a pipeline that takes embeddings."""

    def __init__(self) -> None:
        self.pipe, self.options = zoo.sd()
        self.pipe.set_progress_bar_config(disable=True)

    def chunks(self) -> Iterator[tuple[int, int]]:
        yield 0, IMAGES

    def call(self, start: int, end: int) -> torch.Tensor:
        embeds = ("prompt_embeds", "negative_prompt_embeds")
        given = {k: v.repeat(end - start, 1, 1) if k in embeds else v for k, v in self.options.items()}
        noises = [torch.Generator().manual_seed(i) for i in range(start, end)]
        given |= {"num_inference_steps": STEPS, "generator": noises, "output_type": "np"}
        return torch.from_numpy(self.pipe(**given).images).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def recording() -> Recording:
    calls: Any = Calls()
    with torch.inference_mode():
        return record(calls)[0]


def plan_with(recording: Recording, chosen: Any) -> Any:
    trajectory = Trajectory.of(recording, Conversion(recording.scheduler))
    with torch.inference_mode():
        return parts.PartRollout(Replay(recording), recording, trajectory, chosen).plan((0, 2, 4))


def test_all_parts_are_the_tuner_and_none_is_holding(recording: Recording) -> None:
    trajectory = Trajectory.of(recording, Conversion(recording.scheduler))
    with torch.inference_mode():
        known = Replay(recording), recording, trajectory, range(IMAGES)
        wanted, apart = Rollout(*known).plan((0, 2, 4)), Rollout(*known, apart=True).plan((0, 2, 4))
    assert plan_with(recording, parts.ADDED["… + corrected computed steps"]) == wanted
    assert plan_with(recording, parts.ADDED["… + what guidance adds"]) == apart != wanted
    held = Step("hold", space="sample")
    assert plan_with(recording, parts.Parts(weights=False)).steps == (FULL, held) * 3


def test_each_part_adds_what_it_says(recording: Recording) -> None:
    found = {name: plan_with(recording, chosen) for name, chosen in parts.ADDED.items()}
    alone = found["predictions, one number each, fitted to the baseline's states"].steps
    assert all(s.fit is None for s in alone[::2]) and all(s.fit and not any(s.fit.latents) for s in alone[1::2])
    latents = found["… + latents"].steps
    assert all(s.fit is None for s in latents[::2]) and all(s.fit and s.fit.latents[0] for s in latents[1::2])
    assert all(len(s.fit.predictions) == 1 for s in latents[1::2] if s.fit)
    assert any(s.fit for s in found["… + corrected computed steps"].steps[::2])


def test_settings_are_what_was_promised() -> None:
    found = list(robustness.settings(3))
    assert len({setting.name for setting in found}) == len(found) == 17
    assert sum(setting.strength is not None for setting in found) == 4
    words, known = found[-1].prompts, found[-2].prompts
    assert len(words) == len(known) == 3 and not {*words} & {*known}


def test_no_prompt_that_calibrates_is_measured() -> None:
    measured = {p for name in robustness.WORDS.values() for p in (robustness.DATA / name).read_text().splitlines()}
    assert len(measured) == 48
    assert not measured & set((robustness.DATA / "varied_prompts.txt").read_text().splitlines())
