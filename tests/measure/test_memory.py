"""Peak memory, in the unit of each system."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffusion_accel.measure import memory


@pytest.mark.parametrize(("platform", "byte"), [("linux", 1024), ("darwin", 1)])
def test_the_unit_of_the_system(platform: str, byte: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(getrusage=lambda who: SimpleNamespace(ru_maxrss=3 * 2**20), RUSAGE_SELF=0)
    monkeypatch.setattr(memory, "resource", usage)
    monkeypatch.setattr(sys, "platform", platform)
    assert memory.process_peak() == 3 * 2**20 * byte


def test_where_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path, *args: Any, **options: Any) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(memory, "resource", None)
    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(Path, "write_text", missing)
    memory.reset_peak("cpu")
    assert memory.peak_mib("cpu") is None and memory.process_peak() is None


def test_here() -> None:
    memory.reset_peak("cpu")
    assert (memory.peak_mib("cpu") or 1) > 0
