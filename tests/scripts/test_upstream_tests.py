"""The program that runs diffusers' tests with accelerated pipelines, on tests of two lines."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import upstream_process

upstream = importlib.import_module("upstream_tests")  # of scripts/, which pytest's settings put on the path
FAKE = """
import signal

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel


def pipeline():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4, **blocks)
    made = DDPMPipeline(unet, DDPMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe):
    return pipe(generator=torch.manual_seed(0), num_inference_steps=4, output_type="np").images


class TestFake:
    def test_a_call_is_the_call_again(self):
        pipe = pipeline()
        assert (draw(pipe) == draw(pipe)).all() and isinstance(pipe, DDPMPipeline)

    def test_every_step_is_computed(self):
        pipe = pipeline()
        calls = []
        pipe.unet.conv_in.register_forward_pre_hook(lambda *_: calls.append(1))
        draw(pipe)
        assert len(calls) == 4

    def test_needs_the_hub(self):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    def test_hangs(self):
        signal.raise_signal(signal.SIGALRM)  # what the limit of time sends

    def test_fails(self):
        assert False

    @pytest.mark.skipif(True, reason="slow")
    def test_is_skipped(self):
        pass
"""


def ended(outcome: str, message: str = "", digests: tuple[str, ...] = ("a",)) -> dict[str, Any]:
    return {"outcome": outcome, "message": message, "digests": list(digests), "accelerated_calls": len(digests)}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the program on the fake tests and returns the exit code and the results that it keeps."""
    folder = tmp_path / "tests" / "pipelines" / "ddpm"
    folder.mkdir(parents=True)
    (folder / "test_fake.py").write_text(FAKE)
    place = tmp_path / "results.json"
    monkeypatch.setattr(upstream, "start", upstream_process.start)
    (tmp_path / "results-work" / "hub").mkdir(parents=True)  # stand-ins: none are needed

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        given = ["--tests", str(tmp_path / "tests"), "--json", str(place), "--kinds", "ddpm", *arguments]
        monkeypatch.setattr(sys, "argv", ["upstream_tests.py", *given])
        return upstream.main(), json.loads(place.read_text())

    return run


@pytest.mark.slow
def test_what_passes_plainly_runs_accelerated(
    program: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, kept = program("--settings", "plain", "neutral", "real")
    plain, neutral, real = (kept["results"]["ddpm"][setting] for setting in ("plain", "neutral", "real"))
    prefix = "tests/pipelines/ddpm/test_fake.py::TestFake::test_"
    ends = {name.removeprefix(prefix): upstream.why(test) for name, test in plain.items()}
    assert ends == {
        "a_call_is_the_call_again": "passed",
        "every_step_is_computed": "passed",
        "needs_the_hub": "hub",
        "hangs": "too long",
        "fails": "failed",
        "is_skipped": "skipped",
    }
    again, computed = f"{prefix}a_call_is_the_call_again", f"{prefix}every_step_is_computed"
    assert {*neutral} == {*real} == {again, computed}  # the others do not run again
    assert plain[again]["accelerated_calls"] == 0 and neutral[again]["accelerated_calls"] == 2
    assert neutral[again]["attached"]["reuse"] == 1
    assert neutral[again]["digests"] == plain[again]["digests"] != real[again]["digests"]
    assert neutral[computed]["outcome"] == "passed"
    assert real[again]["outcome"] == "passed" and real[computed]["outcome"] == "failed"
    printed = capsys.readouterr().out
    assert code == 0 and "| ddpm | 1 | 2 | 1 | 1 | 1 | 1 | 2 of 2 | 3 of 3 | – | – | 1 of 2 | 0 of 3 |" in printed
    assert f"real: {computed}: " in printed

    monkeypatch.setattr(upstream, "start", None)  # all is there: nothing runs again
    assert program("--settings", "plain", "neutral", "real") == (0, kept)


def test_a_run_that_was_stopped_goes_on(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is not run again: the test that is said to have failed would pass."""
    name, left_out = "tests/pipelines/ddpm/test_fake.py::TestFake::test_a_call_is_the_call_again", []

    def killed(command: Any, folder: Path, environment: dict[str, str], log: Path) -> int:
        left_out.append(Path(environment["UPSTREAM_LEAVE_OUT"]).read_text())
        results = Path(environment["UPSTREAM_RESULTS"])
        results.write_text(json.dumps({"test": name, **ended("passed")}) + "\n") if len(left_out) == 1 else None
        return -9 if len(left_out) == 1 else 0

    monkeypatch.setattr(upstream, "start", killed)
    with pytest.raises(SystemExit, match="pytest ended with exit code -9"):
        program("--settings", "plain")
    _, kept = program("--settings", "plain")
    assert left_out == ["", name] and list(kept["results"]["ddpm"]["plain"]) == [name]


def test_what_is_refused(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="test_fake.py did not run plainly: add plain to --settings"):
        program("--settings", "neutral")
    (tmp_path / "results.json").write_text(json.dumps({"versions": {"diffusers": "0.1"}}))
    with pytest.raises(SystemExit) as refused:
        program()
    assert refused.value.code == 2 and "results of other versions" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        program("--tests", str(tmp_path / "results.json"))
    assert refused.value.code == 2 and "no tests/ folder of diffusers" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [("test_draws", 1), ("test_faster_cache_state", 0)])
def test_a_failure_counts_if_it_is_not_explained(
    name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = {setting: {f"a.py::{name}": ended(end)} for setting, end in (("plain", "passed"), ("neutral", "failed"))}
    place = tmp_path / "results.json"
    place.write_text(json.dumps({"versions": {"diffusers": "1"}, "done": [], "results": {"flux": tests}}))
    monkeypatch.setattr(sys, "argv", ["upstream_tests.py", "--json", str(place), "--show"])
    assert upstream.main() == code
    assert ("(no fault: " in capsys.readouterr().out) == (not code)


def test_a_neutral_setting_that_changes_something_is_told() -> None:
    plain = {"a": ended("passed"), "b": ended("passed"), "c": ended("passed", digests=("a", "b"))}
    neutral = {
        "a": ended("passed"),
        "b": ended("failed", "E   first\nE   AssertionError: 3 != 4"),
        "c": ended("passed", digests=("a", "c")),
    }
    results = {"sd": {"plain": plain, "neutral": neutral, "real": {"a": ended("passed", digests=("other",))}}}
    assert [*upstream.differences(results)] == [
        ("neutral", "b", "AssertionError: 3 != 4"),
        ("neutral", "c", "1 of 2 calls return other bits"),
    ]
    assert upstream.row("sd", results["sd"])[7:] == ["2 of 3", "3 of 4", "–", "–", "1 of 1", "0 of 1"]
