"""The program that builds the data set: its errors, names and pixels."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sticker import concepts

builder = importlib.import_module("build_sticker_dataset")  # of scripts/, which pytest's settings put on the path


def test_builder_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    arguments = ["--out", str(out), "--npm-cache", str(cache)]
    monkeypatch.setattr(builder.shutil, "which", lambda name: None)
    assert builder.main(arguments) == 1
    assert "npm is not on the PATH" in capsys.readouterr().err
    (cache / builder.NAMES.filename).write_bytes(b"not a package")
    assert builder.main(arguments) == 1
    assert "pinned checksum" in capsys.readouterr().err
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["cache"]
    out.mkdir()
    with pytest.raises(SystemExit) as usage:
        builder.main(arguments)
    assert usage.value.code == 2


def test_builder_names_and_pixels() -> None:
    assert concepts.slug("Woman’s Hat & Piñata") == "womans-hat-and-pinata"
    assert concepts.clean_label("Flag: Côte-d’Or (old)") == "flag cote d'or old"
    assert {"red heart", "rocket"} <= concepts.read_starter_names()
    edge = Image.fromarray(np.array([[[255, 0, 0, 255], [0, 255, 0, 0]]], np.uint8).repeat(2, 0), "RGBA")
    small = builder.resize_rgba(edge, 1)
    assert small[0, 0, 0] == 255 and small[0, 0, 1] == 0 and 100 < small[0, 0, 3] < 155
