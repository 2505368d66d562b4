"""The entry `forecast`: what it reads, and what it refuses before a model is loaded."""

from __future__ import annotations

import pytest

from diffusion_accel import ConfigurationError
from diffusion_accel.bench.entries import Entry, check_entries
from diffusion_accel.bench.forecasting import METHODS, Forecast, Rule


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("hermite", Rule("hermite", 5, 2)),
        ("hermite,3", Rule("hermite", 3, 2)),
        ("taylor@3,4,sample", Rule("taylor", 4, 3, "sample")),
        ("dmd,sample", Rule("dmd", 5, 0, "sample")),
        ("spectrum", Rule("spectrum", 0)),
        ("spectrum,5,epsilon", Rule("spectrum", 5, 0, "epsilon")),
        ("foca,2", Rule("foca", 2)),
        ("sada", Rule("sada", 0)),
        ("easycache", Rule("easycache", 0.05)),
        ("easycache,0.2", Rule("easycache", 0.2)),
    ],
)
def test_rules_are_read(text: str, rule: Rule) -> None:
    entry = Entry.parse(f"forecast:{text}")
    assert isinstance(entry.feature, Forecast) and entry.feature.parsed == rule
    assert entry.name == f"forecast {text}" and not entry.is_peer
    assert entry.by_image == METHODS[rule.method].adaptive


def test_without_settings_it_is_the_usual_one() -> None:
    feature = Entry.parse("forecast").feature
    assert isinstance(feature, Forecast) and feature == Forecast()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hermit,5", "unknown forecast .*did you mean 'hermite'"),
        ("", "^$"),
        ("hold@1", r"forecast takes hold\[,EVERY\]"),
        ("taylor@4", r"taylor\[@ORDER\] \(1 to 3\)"),
        ("taylor,0", "1 to 10000 steps"),
        ("taylor,2.5", "1 to 10000 steps"),
        ("taylor,10001", "1 to 10000 steps"),
        ("taylor,5,noise", r"\[,epsilon\|sample\]"),
        ("taylor,5,sample,3", r"\[,epsilon\|sample\]"),
        ("sada,4", "sada and nothing else"),
        ("sada,sample", "sada and nothing else"),
        ("easycache,0", "above 0"),
        ("easycache,0.1,sample", "above 0"),
    ],
)
def test_bad_rules_are_refused(text: str, words: str) -> None:
    if not text:
        with pytest.raises(ConfigurationError, match="unknown forecast ''; the methods are: hold, taylor"):
            Rule.parse(text)
        return
    with pytest.raises(ConfigurationError, match=words):
        Entry.parse(f"forecast:{text}")


def test_sada_refuses_schedulers_that_repeat_timesteps() -> None:
    entry = Entry.parse("forecast:sada")
    check_entries([entry], 20, "dpm++")
    with pytest.raises(ConfigurationError, match="forecast sada cannot work: .* heun repeats timesteps"):
        check_entries([entry], 20, "heun")
