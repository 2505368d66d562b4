"""`compare`, the public verb: prompts in, numbers and images out, and nothing left switched."""

from __future__ import annotations

from typing import Any

import pytest

from diffusion_accel import ConfigurationError, EncoderReuse, accelerate
from diffusion_accel.measure.comparison import compare
from diffusion_accel.pipelines.loading import load_pipeline


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = load_pipeline("sticker")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_every_prompt_has_its_image_and_its_seed(pipe: Any) -> None:
    accelerate(pipe, EncoderReuse(schedule=(0, 3), batch_decoder=False))
    told: list[tuple[str, float]] = []

    def progress(what: str, share: float = 0.0, left: float | None = None) -> None:
        told.append((what, share))

    call = {"steps": 4, "guidance_scale": 3.0, "height": 96, "width": 96}
    found = compare(pipe, ["a", "b", "c"], **call, seed=5, batch=2, rounds=1, progress=progress)
    assert len(found.baseline) == len(found.accelerated) == len(found.fidelity) == 3
    assert 1 < found.flop_ratio < 2 and found.time_ratio > 0
    last = compare(pipe, "c", **call, seed=7, rounds=1)
    assert last.accelerated[0].tobytes() == found.accelerated[2].tobytes(), "image k starts from seed + k"
    assert [what for what, _ in told] == ["baseline", "accelerated"] * 2 and told[-1][1] == 0.75
    assert pipe.acceleration.enabled("encoder_reuse")
    pipe.acceleration.remove()


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "prompts must be at least 1"),
        (["", " "], {}, "prompts are all empty"),
        (7, {}, "a text or a list of texts"),
        ("a", {"steps": 0}, "steps must be a whole number"),
        ("a", {"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ("a", {"height": 96.0}, "height must be a whole number"),
        ("a", {"rounds": 0}, "rounds must be a whole number"),
        ("a", {"seed": -1}, "seed must be a whole number"),
        ("a", {"round": 3}, "did you mean rounds"),
        ("a", {}, "nothing to compare"),
    ],
)
def test_bad_input_is_refused(pipe: Any, prompts: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        compare(pipe, prompts, **options)
