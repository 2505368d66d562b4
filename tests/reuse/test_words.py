"""What the reuse engine says of a call: plain words, nothing that did not happen, the counters themselves untouched."""

from __future__ import annotations

from typing import Any

import pytest
import zoo
from zoo import run

from diffusion_accel import EncoderReuse, Reuse, accelerate
from diffusion_accel.reuse.words import in_words


@pytest.mark.parametrize(
    ("feature", "says"),
    [
        (Reuse(plan="hold:3"), "2 steps computed, 4 held, at most 4.1 kB kept in memory"),
        (Reuse.neutral(), "6 steps computed"),
        (Reuse(plan="shallow:3,1"), "2 steps computed, 4 in the outer blocks only, at most "),
        (
            EncoderReuse(schedule=(0, 3)),
            "2 steps computed, 4 in the decoder only, the decoder called 3 times for 6 steps,",
        ),
    ],
    ids=["hold", "neutral", "shallow", "encoder"],
)
def test_a_call_in_words(feature: Any, says: str) -> None:
    pipe, call = zoo.sd()
    accelerate(pipe, feature)
    run(pipe, call, steps=6)
    report = pipe.acceleration.report()
    line = str(report).splitlines()[1]
    assert line.startswith(f"  {feature.name}: {says}"), line
    assert report.counters[feature.name]["full_steps"] == report.to_dict()["counters"][feature.name]["full_steps"]
    assert "_steps" not in line and "bytes" not in line and "words" not in report.to_dict()


def test_what_else_there_may_be() -> None:
    counters = {"full_steps": 4.0, "reused_steps": 6, "hold_steps": 6, "corrected_steps": 1, "unguided_steps": 3}
    said = in_words(counters | {"controlnet_runs": 4, "controlnet_skipped": 1, "noise_injections": 2})
    assert said == (
        "4 steps computed, 6 held, 1 computed step corrected by what was tuned, one branch of guidance left out at "
        "3 steps, the ControlNet called 4 times, left out 1 time, prior noise added at 2 steps"
    )
    cache = in_words({"blocks_run": 12, "attentions_run": 1})
    assert cache == "blocks of the denoiser computed 12 times, attentions 1 time"
