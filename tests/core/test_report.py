"""The report of a call, for people."""

from __future__ import annotations

import pytest

from diffusion_accel.report import Report, by_name, several, size


def test_counters_of_features_without_words_have_their_names_and_sizes() -> None:
    report = Report(20, 1.5, counters={"mine": {"guided_steps": 8.0, "peak_cache_bytes": 110_592, "bytes_sent": 12}})
    assert str(report).splitlines()[:2] == [
        "20 steps in 1.50 s",
        "  mine: guided steps 8, peak cache 111 kB, sent 12 bytes",
    ]
    assert by_name({}) == "" and "words" not in report.to_dict()


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (2_500_000, "2.5 MB"), (7e12, "7e+03 GB")]
)
def test_sizes(count: float, words: str) -> None:
    assert size(count) == words


def test_what_was_chosen_has_units() -> None:
    choice = {"plan": "tuned:fast", "speedup": 3.013, "evaluations": 5, "psnr_median": 46.11, "psnr_floor": None}
    line = str(Report(20, 1.0, choices={"reuse": choice})).splitlines()[1]
    assert line == "  reuse chose plan tuned:fast, speedup 3.01x, evaluations 5, psnr median 46.1 dB"


def test_one_and_several() -> None:
    assert several(1, "step") == "1 step" and several(0, "step") == "0 steps"
    assert several(1, "process", "processes") == "1 process" and several(2, "process", "processes") == "2 processes"
