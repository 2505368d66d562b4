"""The loop over stages: what is kept is loaded, what is not complete is gone on with, the rest is run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.ptq.folder import write_values
from diffusion_accel.quant.ptq.run import perform
from diffusion_accel.quant.ptq.stage import Job, Part, Stage


def run(work: Path, events: list[Any]) -> Any:
    """Two parts of tensors, then a table that is complete with three entries."""

    def part(_state: Any, job: Job) -> dict[str, Any]:
        events.append(("run", job.part.key))
        return {"x": torch.tensor([job.part.given])}

    def table(_state: Any, job: Job) -> dict[str, Any]:
        events.append(("from", sorted(job.kept or {})))
        return {**(job.kept or {}), "a": 1, "b": 2, "c": 3}

    stages = (
        Stage("tensors", part, lambda s, p, v: s.found.append(int(v["x"])), "t-{:02d}.safetensors",
              parts=lambda _: (Part(0, 7), Part(1, 9))),
        Stage("", lambda *_: events.append("never") or {}, wanted=lambda _: False),
        Stage("table", table, lambda s, _p, v: s.found.append(v), "table.json", complete=lambda _, v: len(v) == 3),
    )  # fmt: skip
    state: Any = SimpleNamespace(work=work, seconds={}, found=[])
    perform(stages, state)
    return state


def test_each_part_is_run_once_and_loaded_each_time(tmp_path: Path) -> None:
    events: list[Any] = []
    first = run(tmp_path, events)
    assert events == [("run", 0), ("run", 1), ("from", [])] and first.found == [7, 9, {"a": 1, "b": 2, "c": 3}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t-00.safetensors", "t-01.safetensors", "table.json"]
    assert first.seconds.keys() == {"tensors", "table"}
    events.clear()
    assert run(tmp_path, events).found == first.found and not events


def test_what_is_missing_or_not_complete_is_made(tmp_path: Path) -> None:
    events: list[Any] = []
    first = run(tmp_path, events)
    events.clear()
    (tmp_path / "t-01.safetensors").unlink()
    write_values(tmp_path / "table.json", {"a": 1})
    assert run(tmp_path, events).found == first.found and events == [("run", 1), ("from", ["a"])]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    run(tmp_path, [])
    (tmp_path / "t-00.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigurationError, match="is damaged; forget the run"):
        run(tmp_path, [])
