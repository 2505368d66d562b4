"""Tuning beside presets: who is compared with whom, and on what."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

tuning = importlib.import_module("measure_tuning")  # of scripts/, which pytest's settings put on the path


def row(computed: int, median: float, worst: float, **more: Any) -> dict[str, Any]:
    return {
        "model": "runs/dit/pipeline",
        "computed": computed,
        "median": median,
        "worst_decile": worst,
        "worst": 1.0,
    } | more


def test_the_rival_computes_no_more_steps(capsys: pytest.CaptureFixture[str]) -> None:
    presets = [
        row(25, 60.0, 55.0, preset="hold:2@2"),
        row(17, 48.0, 41.0, preset="hold:3@1"),
        row(13, 47.0, 44.0, preset="hold:4@1"),
    ]
    own = row(17, 50.0, 43.0, speedup=2.3, time_ratio=2.4, cpu_seconds=60.0)
    tuning.show(own, [*presets, own])
    said = capsys.readouterr().out
    assert "| dit | 2.3x | 17 | 2.40 | 60 | 50.0 / 43.0 / 1.0 | `hold:3@1` | 17 |" in said
    assert "+2.0, -1.0" in said, "the worst decile is held to the best of any rival"
    tuning.show(row(5, 30.0, 25.0, speedup=5.0, time_ratio=5.0, cpu_seconds=None), presets)
    assert "none is as fast" in capsys.readouterr().out


def test_nothing_that_is_measured_calibrates(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = SimpleNamespace()
    for kind in (tuning.PROMPT, tuning.CLASS):
        monkeypatch.setattr(tuning, "condition_of", lambda _, kind=kind: kind)
        monkeypatch.setattr(tuning, "class_names", lambda _: {})
        monkeypatch.setattr(tuning, "class_count", lambda _: 291)
        own, other = (tuning.texts(pipe, 24, measured) for measured in (True, False))
        assert len(own) == len(other) == 24 and not {*own} & {*other} and len({*own}) == 24
