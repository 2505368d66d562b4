"""`auto`: the first call is exact and teaches, the next ones follow; what is remembered, and where."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import call
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from reuse_tools import counters
from zoo import ddim, dit, run, sd, sd3, sd_without_guidance

from diffusion_accel import ConfigurationError, Reuse, accelerate
from diffusion_accel.measure.comparison import compare_calls
from diffusion_accel.parallel.patch_parallel import PatchParallel
from diffusion_accel.reuse import auto_memory, recorded
from diffusion_accel.reuse.auto import MOST_NEAR, NEAR, Auto, Candidate
from diffusion_accel.reuse.plan import Plan
from diffusion_accel.reuse.preset import Preset
from diffusion_accel.reuse.probe import Probe, nearness


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file of this test; the process has learned nothing."""
    monkeypatch.setenv(auto_memory.VARIABLE, str(tmp_path / "cache" / "auto.json"))
    auto_memory.forget()
    yield tmp_path / "cache" / "auto.json"
    auto_memory.forget()


def chose(pipe: Any) -> dict[str, Any]:
    choice: dict[str, Any] = pipe.acceleration.report().choices["reuse"]
    return choice


def learned(pipe: Any, call_: dict[str, Any], **changes: Any) -> bool:
    """Whether a call computes everything and says that it is a first one."""
    run(pipe, call_, **changes)
    first = chose(pipe)["outcome"].startswith("first call")
    assert first == (counters(pipe)["reused_steps"] == 0)
    return first


@pytest.mark.parametrize("build", [sd, sd_without_guidance, dit, sd3])
def test_the_first_call_is_exact_and_the_second_follows_what_it_taught(build: Any) -> None:
    pipe, given = build()
    plain = run(pipe, given, steps=8)
    accelerate(pipe, Reuse(plan="auto:2"))
    assert torch.equal(run(pipe, given, steps=8), plain) and "progress_bar" not in vars(pipe)
    assert chose(pipe)["plan"] == "full" and "for the next ones" in chose(pipe)["outcome"]
    assert counters(pipe)["full_steps"] == 8 and counters(pipe)["peak_cache_bytes"] == 0
    images = run(pipe, given, steps=8, seed=1)
    steps = Plan.parse(chose(pipe)["plan"]).steps
    assert len(steps) == 8 and 1 <= counters(pipe)["full_steps"] == sum(s.mode == "full" for s in steps) <= 4
    accelerate(pipe, Reuse(plan=chose(pipe)["plan"]))  # what the report names draws the same
    assert torch.equal(run(pipe, given, steps=8, seed=1), images)


def test_what_was_learned_belongs_to_model_scheduler_steps_and_guidance() -> None:
    pipe, given = sd()
    accelerate(pipe, Reuse(plan="auto:2"))
    assert learned(pipe, given) and not learned(pipe, given)
    assert learned(pipe, given, steps=7) and learned(pipe, given, guidance_scale=1.0)
    own = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(own.config)
    assert learned(pipe, given)
    pipe.scheduler = DDIMScheduler.from_config(own.config, timestep_spacing="trailing")
    assert learned(pipe, given)
    pipe.scheduler = own
    assert not learned(pipe, given)
    with torch.no_grad():
        next(pipe.unet.parameters()).add_(1)
    assert learned(pipe, given)


def test_another_process_knows_it_and_another_speed_needs_no_other_call(file: Path) -> None:
    pipe, given = sd()
    accelerate(pipe, Reuse(plan="auto:1.5"))
    assert learned(pipe, given, steps=12)
    auto_memory.forget()
    accelerate(pipe, Reuse(plan="auto", speedup=3, guidance="reuse:2"))
    assert not learned(pipe, given, steps=12) and counters(pipe)["full_steps"] <= 4
    assert counters(pipe)["unguided_steps"] > 0
    file.unlink()
    auto_memory.forget()
    assert learned(pipe, given, steps=12)


def test_off_writes_nothing_and_the_process_still_knows(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(auto_memory.VARIABLE, "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file.parent.parent))
    pipe, given = sd()
    accelerate(pipe, Reuse(plan="auto:2"))
    assert learned(pipe, given) and not learned(pipe, given)
    assert not list(file.parent.parent.rglob("*.json"))
    monkeypatch.delenv(auto_memory.VARIABLE)
    assert auto_memory.place() == file.parent.parent / "diffusion-accel" / "auto.json"


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "something else"}', '{"format": "diffusion-accel auto"}'])
def test_a_damaged_file_is_ignored_with_a_warning_and_stays(
    file: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.mkdir()
    file.write_text(text)
    pipe, given = sd()
    accelerate(pipe, Reuse(plan="auto:2"))
    with caplog.at_level(logging.WARNING):
        assert learned(pipe, given) and not learned(pipe, given)
    assert len(caplog.records) == 1 and "is not used" in caplog.text and auto_memory.VARIABLE in caplog.text
    assert file.read_text() == text


@pytest.mark.sampled(3)
@pytest.mark.parametrize("entry", [3, [[1]], [["a", "full hold"]], [[40, "hold full"]], [[40, 3]], [[1e400, "full"]]])
def test_a_damaged_entry_is_ignored(file: Path, entry: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipe, given = sd()
    accelerate(pipe, Reuse(plan="auto:2"))
    run(pipe, given)
    values = json.loads(file.read_text())
    values["learned"] = dict.fromkeys(values["learned"], entry)
    file.write_text(json.dumps(values))
    auto_memory.forget()
    with caplog.at_level(logging.WARNING):
        assert learned(pipe, given)
    assert "is not used" in caplog.text


def test_the_file_is_bounded_and_a_plan_for_other_steps_is_not_followed(file: Path) -> None:
    for number in range(auto_memory.MOST + 5):
        auto_memory.remember(f"key {number}", (Candidate(50.0, Preset("hold", 2).for_steps(4)),))
    kept = json.loads(file.read_text())["learned"]
    assert len(kept) == auto_memory.MOST and "key 4" not in kept and "key 5" in kept
    pipe, given = sd()
    accelerate(pipe, Reuse(plan="auto:2"))
    run(pipe, given)
    key = list(json.loads(file.read_text())["learned"])[-1]
    auto_memory.remember(key, (Candidate(50.0, Preset("hold", 2).for_steps(4)),))
    run(pipe, given)
    assert counters(pipe)["reused_steps"] == 0 and chose(pipe)["plan"] == "full"


def test_a_call_that_fails_teaches_nothing_and_leaves_nothing(file: Path) -> None:
    pipe, given = sd()
    plain = run(pipe, given)
    accelerate(pipe, Reuse(plan="auto:2"))

    def stop(_pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            raise ZeroDivisionError
        return values

    with pytest.raises(ZeroDivisionError):
        run(pipe, given, callback_on_step_end=stop)
    assert not file.exists() and not hasattr(pipe.unet, "_diffusers_hook")
    assert "step" not in vars(pipe.scheduler)
    assert learned(pipe, given)
    pipe.acceleration.remove()
    assert torch.equal(run(pipe, given), plain)


def test_a_call_that_is_stopped_or_changed_teaches_nothing_and_the_next_one_does(file: Path) -> None:
    def stop(pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 3  # as diffusers documents it
        return values

    def change(_pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "latents": values["latents"] * 1.1} if step == 3 else values

    for callback, why in ((stop, "stopped after 4 of 8 steps"), (change, "a callback changed")):
        auto_memory.forget()
        file.unlink(missing_ok=True)
        pipe, given = sd()
        accelerate(pipe, Reuse(plan="auto:2"))
        run(pipe, given, steps=8, callback_on_step_end=callback)
        assert why in chose(pipe)["outcome"] and counters(pipe)["reused_steps"] == 0 and not file.exists()
        assert learned(pipe, given, steps=8) and file.exists() and not learned(pipe, given, steps=8)
    auto_memory.forget()
    file.unlink()
    watched: list[int] = []
    assert learned(
        pipe, given, steps=8, callback_on_step_end=lambda _p, step, _t, values: (watched.append(step), values)[1]
    )
    assert watched == [*range(8)] and file.exists(), "one that only watches"


@pytest.mark.parametrize(
    ("scheduler", "steps", "why"),
    [(HeunDiscreteScheduler, 6, "same timestep"), (DDIMScheduler, 3, "too few")],
)
def test_where_nothing_can_be_learned_every_step_is_computed_and_the_report_says_why(
    scheduler: Any, steps: int, why: str
) -> None:
    pipe, given = sd()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    accelerate(pipe, Reuse(plan="auto:2"))
    run(pipe, given, steps=steps)
    assert why in chose(pipe)["outcome"]
    run(pipe, given, steps=steps)
    assert counters(pipe)["reused_steps"] == 0 and "no plan is near enough" in chose(pipe)["outcome"]


def test_a_stochastic_scheduler_can_be_learned() -> None:
    pipe, given = sd()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    accelerate(pipe, Reuse(plan="auto:2"))
    assert learned(pipe, given, steps=8) and not learned(pipe, given, steps=8)


def test_the_probe_repeats_the_call_and_measures_what_a_plan_leaves() -> None:
    pipe, given = sd()
    accelerate(pipe, Reuse(plan="full"))
    for generator in (torch.Generator().manual_seed(3), [torch.Generator().manual_seed(3)], None):
        arguments = {**given, "num_inference_steps": 8, "generator": generator}
        torch.manual_seed(4)
        probe = Probe(pipe, arguments)
        reference = pipe(**arguments)[0]
        after = torch.random.get_rng_state()
        again = probe.latents(Preset("full").for_steps(8))
        assert again is not None and nearness(reference, again) == MOST_NEAR
        held = probe.latents(Preset("hold", 2).for_steps(8))
        assert held is not None
        error, variance = (reference - held).double().square().mean(), reference.double().var()
        assert math.isclose(nearness(reference, held), float(-10 * (error / variance).log10()), rel_tol=1e-3)
        assert torch.equal(torch.random.get_rng_state(), after)
    assert nearness(reference, None) == nearness(reference, reference * float("nan")) == -MOST_NEAR


def test_where_fewer_steps_come_nearer_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, given = sd()
    monkeypatch.setattr(Probe, "_fewer", lambda *_: MOST_NEAR)
    accelerate(pipe, Reuse(plan="auto:2"))
    run(pipe, given, steps=8)
    run(pipe, given, steps=8)
    assert counters(pipe)["reused_steps"] == 0 and "every step is computed" in chose(pipe)["outcome"]


def test_a_call_that_cannot_be_repeated_succeeds(
    monkeypatch: pytest.MonkeyPatch, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, given = sd()
    plain = run(pipe, given)

    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(Probe, "latents", fail)
    accelerate(pipe, Reuse(plan="auto:2"))
    assert torch.equal(run(pipe, given), plain) and torch.equal(run(pipe, given), plain)
    assert caplog.text.count("cannot be repeated (no room)") == 1 and not file.exists()


def test_a_comparison_is_with_what_follows_the_first_call() -> None:
    pipe, given = sd()
    accelerate(pipe, Reuse(plan="auto:2"))
    found = compare_calls(pipe, lambda current: run(current, given, steps=8), flop_ratio=1.0)
    assert math.isfinite(found.psnr[0]) and found.report.counters["reuse"]["reused_steps"] >= 4


def test_processes_that_draw_one_image_do_not_learn() -> None:
    reason = Reuse(plan="auto").clash(PatchParallel())
    assert reason and "plan of its own" in reason
    for cache, refused in (("first-block:0.1", True), ("mag", True), ("taylorseer", False)):
        assert ("first block" in (Reuse(plan=cache).clash(PatchParallel()) or "")) == refused
    assert Reuse(plan="hold:2").clash(PatchParallel()) is None and Reuse(plan="auto").clash(Reuse()) is None


def test_the_choice_by_speed_and_by_nearness() -> None:
    plans = [
        Candidate(value, Preset("hold", n).for_steps(12)) for value, n in ((NEAR + 9, 2), (NEAR, 3), (NEAR - 1, 4))
    ]
    assert Auto().choose(plans) == plans[1] and Auto(speedup=2).choose(plans) == plans[0]
    assert Auto(speedup=2.5).choose(plans) == plans[1] and Auto(speedup=9).choose(plans) == plans[2]
    assert Auto(speedup=2.9).choose([Candidate(NEAR, Preset("hold", 3).for_steps(50))]) is not None  # 17 of 50
    assert Auto().choose(plans[2:]) is None and Auto(speedup=2).choose([]) is None


@pytest.mark.parametrize("text", ["auto:0", "auto:1e3", "auto:x", "auto:2,3", "auto@1", "auto:101"])
def test_what_auto_refuses(text: str) -> None:
    with pytest.raises(ConfigurationError, match="auto"):
        Reuse(plan=text)


def test_its_text_and_its_fields() -> None:
    assert Reuse(plan=Auto(2.5)) == Reuse(plan="auto:2.5") == Reuse.parse("auto:2.5")
    assert Reuse.from_dict(Reuse(plan="auto", speedup=2).to_dict()).source == Auto(2.0)
    assert Reuse.accepts_bare("auto") and Reuse.accepts_bare("auto:3")
    for options in ({"speedup": 3.0}, {"min_psnr": 40.0}):
        with pytest.raises(ConfigurationError):
            Reuse(plan="auto:2", **options)


def test_the_influence_of_a_gaussian_is_the_exact_one() -> None:
    """Data of variance v: the denoiser is known, and so is what a change of a prediction does to the last latents.

    Few and large steps towards a small v, as images have beside what is already decided: there the distance to the last
    clean sample is the covariance.
    """
    scheduler, variance = ddim(), 1e-4
    scheduler.set_timesteps(20)
    times = [float(t) for t in scheduler.timesteps]
    ratios = [float(scheduler.alphas_cumprod[int(t)]) for t in times]

    def predicted(x: torch.Tensor, ratio: float) -> torch.Tensor:  # the noise: (x − α·E[x0 | x]) / σ
        gain = ratio**0.5 * variance / (ratio * variance + 1 - ratio)
        return (x - ratio**0.5 * gain * x) / (1 - ratio) ** 0.5

    def walk(changed: int = -1) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        seen, given = [], []
        for i, (time, ratio) in enumerate(zip(times, ratios, strict=True)):
            noise = predicted(x, ratio) + (1e-3 if i == changed else 0.0)
            seen.append(x)
            given.append(noise)
            x = scheduler.step(noise, int(time), x).prev_sample
        return x, seen, given

    last, seen, given = walk()
    found = recorded.influence(scheduler, torch.stack(given), torch.stack(seen), times)
    exact = np.array([float((walk(i)[0] - last).square().mean().sqrt()) / 1e-3 for i in range(20)])
    ratio = found[:12] / exact[:12]
    assert (
        ratio.max() / ratio.min() < 1.1 and exact[:12].max() / exact[:12].min() > 2
    )  # the same course, not a flat one


def test_generate_twice_from_the_command_line(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for number in (1, 2):
        arguments = ["generate", "red apple, 3d style", "--steps", "8", "--seed", str(number), "--reuse", "auto:2"]
        code, out, _ = call(capsys, *arguments, "-o", tmp_path / f"{number}.png")
        assert code == 0
        lines.append(out)
        auto_memory.forget()  # as another process
    assert "first call" in lines[0] and "learned before" in lines[1] and file.exists()
    code, out, _ = call(capsys, "metadata", tmp_path / "2.png", "--json")
    report = json.loads(out)["diffusion_accel"]["report"]
    plan = report["choices"]["reuse"]["plan"]
    assert Plan.parse(plan).made_for == 8 and report["counters"]["reuse"]["reused_steps"] >= 4
    arguments = ["generate", "red apple, 3d style", "--steps", "8", "--seed", "2", "--reuse", f"plan={plan}"]
    code, out, _ = call(capsys, *arguments, "-o", tmp_path / "again.png")
    assert code == 0
    from PIL import Image

    again, before = (np.asarray(Image.open(tmp_path / name)) for name in ("again.png", "2.png"))
    assert np.array_equal(again, before)
