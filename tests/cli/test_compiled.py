"""`--compiled` on the command line, and what `info` says of engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import call
from PIL import Image

PROMPT = "red apple, 3d style"
FEW = ("--steps", "2", "--seed", "1")


def test_an_image_of_a_compiled_model(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("openvino")
    plain, compiled = tmp_path / "plain.png", tmp_path / "compiled.png"
    assert call(capsys, "generate", PROMPT, *FEW, "-q", "-o", plain)[0] == 0
    settings = "openvino,cache=off,parts=denoiser"
    code, text, err = call(capsys, "generate", PROMPT, *FEW, "--compiled", settings, "-o", compiled)
    assert code == 0 and "2 calls by compiled graphs, 0 by torch; 1 graph compiled in " in text
    assert "note: compiling UNet2DConditionModel for 2×12×12×12" in err
    difference = np.asarray(Image.open(plain), dtype=int) - np.asarray(Image.open(compiled), dtype=int)
    assert abs(difference).max() <= 1
    metadata = json.loads(Image.open(compiled).info["diffusion_accel"])
    assert metadata["features"]["compiled"]["parts"] == "denoiser"


def test_what_cannot_work_is_one_line(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    out = ("-q", "-o", tmp_path / "a.png")
    code, _, err = call(capsys, "generate", PROMPT, *FEW, "--compiled", "engine=cuda", *out)
    assert code == 2 and err.startswith("error: --compiled: engine='cuda' is not allowed; use openvino, inductor")
    monkeypatch.setattr("diffusion_accel.compiled.engine.importlib.util.find_spec", lambda name: None)
    code, _, err = call(capsys, "generate", PROMPT, *FEW, "--compiled", *out)
    assert code and "openvino is not installed (pip install 'diffusion-accel[openvino]')" in err
    assert err.count("\n") == 1 and not [*tmp_path.iterdir()]


def test_info_lists_engines_and_what_is_missing(capsys: Any, monkeypatch: Any) -> None:
    engines = json.loads(call(capsys, "info", "--json")[1])["engines"]
    assert [*engines] == ["openvino", "inductor"] and engines["inductor"] == {"missing": None, "devices": []}
    if engines["openvino"]["missing"] is None:
        assert any(device.startswith("CPU (float32") for device in engines["openvino"]["devices"])
    monkeypatch.setattr("diffusion_accel.compiled.engine.importlib.util.find_spec", lambda name: None)
    text = call(capsys, "info")[1]
    assert "engine openvino: openvino is not installed (pip install" in text and "engine inductor: there" in text
