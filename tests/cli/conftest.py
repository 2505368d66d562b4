"""Shared by the tests of the command line."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""
    import diffusion_accel.bench.runner as bench
    import diffusion_accel.generation.loading as run

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    for module in (run, bench):
        monkeypatch.setattr(module, "load_pipeline", load)
