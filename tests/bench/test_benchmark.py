"""`benchmark`, the public verb: names and loaded pipelines, and what is refused before anything is loaded or drawn."""

from __future__ import annotations

from typing import Any

import pytest

from diffusion_accel import ConfigurationError, EncoderReuse, accelerate
from diffusion_accel.bench import benchmark as module
from diffusion_accel.bench.benchmark import benchmark
from diffusion_accel.bench.runner import Job
from diffusion_accel.pipelines.loading import load_pipeline


def test_a_name_gets_what_the_model_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr(module, "bench", lambda job, *rest: jobs.append(job))
    benchmark("sticker", entries=["reuse:hold:2"])
    benchmark("sticker", "red apple, 3d style", entries=["reuse:hold:2"], steps=6, guidance_scale=1.0)
    assert (jobs[0].steps, jobs[0].options, len(jobs[0].prompts)) == (
        20,
        {"guidance_scale": 3.0, "height": 96, "width": 96},
        16,
    )
    assert (jobs[1].steps, jobs[1].options["guidance_scale"], jobs[1].prompts) == (6, 1.0, ("red apple, 3d style",))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"entries": ["reuse:hold:2", "reuse:hold:2"]}, "given twice"),
        ({"entries": "reuse:hold:2"}, "entries must be a list"),
        ({"entries": ["nothing"]}, "the kinds are"),
        ({"entries": ["reuse:tuned:fast"], "steps": 7}, "is for 20 steps"),
        ({"scheduler": "nothing"}, "unknown scheduler"),
        ({"dtype": "int3"}, "dtype must be one of"),
        ({"rounds": 0}, "rounds must be"),
        ({"guidance": 3.0}, "did you mean guidance_scale"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "bench", None)
    with pytest.raises(ConfigurationError, match=words):
        benchmark("sticker", **options)


@pytest.mark.slow
def test_a_loaded_pipeline_is_afterwards_as_it_was() -> None:
    pipe = load_pipeline("sticker")
    pipe.set_progress_bar_config(disable=True)
    scheduler = pipe.scheduler
    call: dict[str, Any] = {"steps": 4, "guidance_scale": 3.0, "height": 96, "width": 96, "scheduler": "ddim"}
    told: list[float] = []

    def progress(what: str, share: float = 0.0, left: float | None = None) -> None:
        told.append(share)

    prompts = ["red apple, 3d style", "panda, noto style"]
    found = benchmark(pipe, prompts, entries=["reuse:full"], **call, rounds=1, converged=False, progress=progress)
    assert [row.psnr for row in found.rows[:2]] == [[200.0, 200.0]] * 2 and found.job.model == "sticker"
    assert pipe.scheduler is scheduler and getattr(pipe, "acceleration", None) is None
    assert told == sorted(told)
    with pytest.raises(ConfigurationError, match="process of its own"):
        benchmark(pipe, prompts, entries=["pab"])
    with pytest.raises(ConfigurationError, match="prompts must be given"):
        benchmark(pipe, entries=["reuse:full"])
    accelerate(pipe, EncoderReuse())
    with pytest.raises(ConfigurationError, match="remove"):
        benchmark(pipe, prompts)
