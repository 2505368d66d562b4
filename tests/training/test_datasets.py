"""Kinds of data, and what is no data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_training import COLOURS

from diffusion_accel.errors import AccelerationError
from diffusion_accel.training import datasets
from diffusion_accel.training.files import TrainingError, UsageError


def test_kinds_of_data(data: Path, tmp_path: Path) -> None:
    assert datasets.find_rows(data / "folder")[0] == "folder"
    kind, rows = datasets.find_rows(data / "classes")
    assert kind == "classes" and datasets.class_names(rows) == sorted(COLOURS) and len(rows) == 30
    kind, rows = datasets.find_rows(data / "captions")
    assert kind == "captions" and rows[0] == {"file": "red0.png", "caption": "a red box"}
    assert datasets.prepare(data / "classes", tmp_path, 16, heldout=0.2) == "classes"
    examples = datasets.load_examples(tmp_path)
    assert len(examples.heldout) == 6 and examples.clean(torch.tensor([0, 1])).shape == (2, 3, 16, 16)
    dropped = torch.tensor([False, True])
    zeros = torch.zeros(2, dtype=torch.int64)
    assert examples.condition(torch.tensor([0, 29]), zeros, dropped).tolist() == [0, 3]  # type: ignore[union-attr]
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert (datasets.load_image(tmp_path / "clear.png", 8) == 255).all()


def test_unusable_data_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "../x.png", "caption": "out"}) + "\n")
    with pytest.raises(UsageError, match="lies outside"):
        datasets.find_rows(tmp_path)
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "x.png", "caption": "gone"}) + "\n")
    with pytest.raises(TrainingError, match="cannot be read"):
        datasets.prepare(tmp_path, tmp_path / "work", 16)
    assert not (tmp_path / "work").exists()
    (tmp_path / "captions.jsonl").write_text('{"file": 3}\n')
    with pytest.raises(AccelerationError, match="needs a file"):
        datasets.find_rows(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no images"):
        datasets.find_rows(tmp_path / "empty")
