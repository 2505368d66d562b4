"""`evaluate`, the public verb: what is drawn, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from zoo import ZOO

from diffusion_accel import ConfigurationError, UnsupportedPipelineError
from diffusion_accel.evaluation.evaluate import evaluate
from diffusion_accel.evaluation.prompts import embedded_prompts, embedded_reference
from diffusion_accel.pipelines.loading import load_pipeline

FEW: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0, "height": 96, "width": 96}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = load_pipeline("sticker")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_each_part_is_drawn_and_measured(pipe: Any) -> None:
    told: list[float] = []

    def progress(what: str, share: float = 0.0, left: float | None = None) -> None:
        told.append(share)

    found = evaluate(pipe, count=4, **FEW, batch=3, progress=progress)
    assert list(found.parts) == list(found.images) == ["train", "heldout"] and found.features == {}
    assert found.images["train"].shape == (4, 3, 96, 96) and found.images["train"].min() < -0.5
    assert found.to_dict()["train"] == found.parts["train"] and found.parts["train"]["n"] == 4
    assert told == sorted(told) == [0, 0.375, 0.5, 0.875]


def test_captions_that_are_named_are_drawn(pipe: Any) -> None:
    chosen = embedded_prompts(5)
    found = evaluate(pipe, chosen, **FEW)
    assert list(found.parts) == ["train"] and found.parts["train"]["n"] == len(set(chosen))
    assert found.real == len(embedded_reference()[1])


def test_bad_input_is_refused(pipe: Any, tmp_path: Path) -> None:
    for options, words in (
        ({"count": 3}, "count must be a whole number of at least 4"),
        ({"data": tmp_path / "nowhere"}, "no such folder"),
        ({"prompts": ["red appel, 3d style"]}, "did you mean 'red apple, 3d style'"),
        ({"prompts": embedded_prompts(2)}, "4 or more"),
        ({"step": 3}, "did you mean steps"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            evaluate(pipe, **options)
    with pytest.raises(UnsupportedPipelineError, match="neither a prompt nor a class"):
        evaluate(ZOO["unet2d"]()[0])
