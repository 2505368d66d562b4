"""Fitted jumps between a few evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from diffusers import DDIMScheduler

from diffusion_accel.prediction import Conversion
from diffusion_accel.tuning import jumps as module
from diffusion_accel.tuning.fits import fitted, mixed
from diffusion_accel.tuning.jumps import Jumps, Seen, Trajectory
from diffusion_accel.tuning.recording import record
from diffusion_accel.tuning.replay import Recording, Replay

from .test_replay import Calls

STEPS, IMAGES = 6, 5


def recorded(built: Callable[[], zoo.Built]) -> Recording:
    with torch.inference_mode():
        return record(Calls(built(), sizes=(IMAGES,), steps=STEPS))[0]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def recording() -> Recording:
    return recorded(zoo.sd)


def jumps(recording: Recording, images: int = IMAGES) -> Jumps:
    trajectory = Trajectory.of(recording, Conversion(recording.scheduler))
    return Jumps(Replay(recording), trajectory, range(images))


def neutral(monkeypatch: pytest.MonkeyPatch) -> None:
    """No images to fit: every jump is its centre."""
    monkeypatch.setattr(
        module, "fitted", lambda features, goal, centre, *_: torch.tensor([centre], dtype=torch.float64)
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_unfitted_jumps_are_ddim(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From every second timestep to the next, by diffusers' own step."""

    def built() -> zoo.Built:
        pipe, call = zoo.sd()
        pipe.scheduler = zoo.ddim(prediction_type=kind, set_alpha_to_one=True)
        return pipe, call

    own = recorded(built)
    neutral(monkeypatch)
    replay, scheduler = Replay(own), DDIMScheduler.from_config(own.scheduler.config)
    with torch.inference_mode():
        rolled = jumps(own).run([0, 2, 4])
        x = own.samples[0]
        scheduler.set_timesteps(3)
        scheduler.timesteps = torch.tensor([own.times[n] for n in (0, 2, 4)])
        scheduler.num_inference_steps = 3
        for n, (time, after) in enumerate(zip((0, 2, 4), (2, 4, None), strict=True)):
            v = replay(x, own.times[time], range(IMAGES))
            table = scheduler.alphas_cumprod
            a = table[int(own.times[time])]
            b = torch.tensor(1.0) if after is None else table[int(own.times[after])]
            if kind == "epsilon":
                noise = v
            elif kind == "sample":
                noise = (x - a.sqrt() * v) / (1 - a).sqrt()
            else:
                noise = a.sqrt() * v + (1 - a).sqrt() * x
            x = b.sqrt() * (x - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise
            assert n < 3
    torch.testing.assert_close(rolled.result, x, rtol=1e-3, atol=1e-3)


def test_all_nodes_unfitted_are_the_baseline_itself(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline is DDIM; the last step of this scheduler ends at the first timestep's α, the jump at 1."""
    neutral(monkeypatch)
    with torch.inference_mode():
        own = jumps(recording)
        rolled = own.run(range(STEPS))
        seen, x = Seen(), own.trajectory.goal(0, own.images)
        for n in range(STEPS):
            torch.testing.assert_close(x, own.trajectory.goal(n, own.images), rtol=1e-3, atol=1e-3)
            seen = own.evaluated(seen, x, n)
            x = mixed(rolled.weights[n], seen.features)


def test_what_was_fitted_is_followed(recording: Recording) -> None:
    own = jumps(recording)
    with torch.inference_mode():
        rolled = own.run([0, 1, 3, 4])
        again = own.follow([0, 1, 3, 4], rolled.weights)
        combined = own.follow(
            [0, 1, 3, 4],
            [
                torch.tensor([(*p, *x) for p, x in zip(c.predictions, c.latents, strict=True)], dtype=torch.float64)
                for c in rolled.combinations
            ],
        )
    assert torch.equal(again.result, rolled.result) and torch.equal(again.decibels, rolled.decibels)
    torch.testing.assert_close(combined.result, rolled.result, rtol=1e-3, atol=1e-3)  # six digits
    assert [w.shape[1] for w in rolled.weights] == [2, 4, 6, 7], "at most 4 predictions and 3 latents"
    assert [c.count for c in rolled.combinations] == [1, 2, 3, 4]


def test_fits_on_the_way_are_at_least_as_near_as_fits_to_the_reference(recording: Recording) -> None:
    """Those know nothing of the errors before them."""
    own, nodes = jumps(recording), [0, 2, 4]
    with torch.inference_mode():
        closed = own.run(nodes)
        seen, weights = Seen(), []
        for start, end in zip(nodes, [*nodes[1:], STEPS], strict=True):
            seen = seen.then(own.trajectory.clean()[start], own.trajectory.latents[start])
            centre = seen.centre(own.trajectory, start, end)
            weights.append(fitted(seen.features, own.trajectory.goal(end, own.images), centre))
        opened = own.follow(nodes, weights)
    assert float(closed.decibels.mean()) >= float(opened.decibels.mean()) - 0.01
    closer = [(r.result - recording.result).pow(2).mean() for r in (closed, opened)]
    assert float(closer[0]) <= float(closer[1]) * 1.01


def test_what_begins_alike_is_evaluated_once(recording: Recording) -> None:
    own = jumps(recording, 2)
    counted: list[int] = []

    def done() -> int:
        counted.append(own.replay.evaluations)
        return counted[-1] - (counted[-2] if len(counted) > 1 else 0)

    with torch.inference_mode():
        first = own.run([0, 2, 3])
        assert done() == 3 * 2
        again = own.run([0, 2, 3])
        assert done() == 0 and torch.equal(again.result, first.result)
        own.run([0, 2, 4, 5])
        assert done() == 2 * 2
        assert len(own.beginnings) == 2 * 5, "what beginnings share is counted once"
        own.beginnings.most = 2 * 2
        own.run([0, 1])
        assert done() == 2 and len(own.beginnings) == 2 * 2
        fresh = own.run([0, 2, 3])
    assert torch.equal(fresh.result, first.result), "what is kept changes nothing"


def test_the_error_counts_by_channel_and_is_bounded(recording: Recording) -> None:
    trajectory = Trajectory.of(recording, Conversion(recording.scheduler))
    own = Jumps(Replay(recording), trajectory, [0, 1], torch.tensor([1.0, 0.0, 0.0, 0.0]))
    off = recording.result[:2].clone()
    off[:, 1:] += 5
    assert (own.decibels(off) == own.decibels(recording.result[:2])).all()
    off[1, 0] += 0.1
    assert own.decibels(off)[1] == pytest.approx(20, abs=0.01)
    assert own.decibels(off)[0] == pytest.approx(100)


def test_a_part_of_a_trajectory(recording: Recording) -> None:
    whole = Trajectory.of(recording, Conversion(recording.scheduler))
    part = whole.part([0, 3])
    assert len(whole) == STEPS and len(part) == 2 and part.times == [recording.times[0], recording.times[3]]
    assert part.alphas == [whole.alphas[0], whole.alphas[3], 1.0] and part.sigmas[-1] == 0.0
    assert torch.equal(part.goal(2, [1]), recording.result[1:2]) and torch.equal(part.clean()[1], whole.clean()[3])
    x = whole.alphas[2] * whole.clean()[2] + whole.sigmas[2] * recording.predictions[2]
    torch.testing.assert_close(x, recording.latents[2], rtol=1e-3, atol=1e-3)


def test_jumps_are_alike_for_all_where_the_channels_are_not_known(recording: Recording) -> None:
    from dataclasses import replace

    other: Any = jumps(replace(recording, channelwise=False))
    with torch.inference_mode():
        assert all(len(w) == 1 for w in other.run([0, 2]).weights)
