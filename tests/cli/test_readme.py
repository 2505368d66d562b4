"""The README's snippets do what they say: Python as it stands, commands as far as they are cheap."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from command import call
from PIL import Image
from snippets import ROOT, STICKER, blocks, commands, prepare, understood, without_models

BLOCKS = blocks(ROOT / "README.md")
PYTHON = [block.text for block in BLOCKS if block.kind == "python"]
COMMANDS = commands(BLOCKS)
ELSEWHERE = {"pip": ".ci/run", "make": ".ci/run, and by hand", "curl": "tests/serving/http/test_docs.py"}


def test_the_first_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    snippet = PYTHON[0].replace("stable-diffusion-v1-5/stable-diffusion-v1-5", STICKER)
    changed = snippet.replace('pipe("a red apple")', 'pipe("a red apple", num_inference_steps=4)')
    assert snippet != PYTHON[0] and changed != snippet
    names: dict[str, object] = {}
    exec(changed, names)
    assert isinstance(names["image"], Image.Image)
    assert "4 steps" in capsys.readouterr().out


def test_python_and_the_command_line_draw_the_same_image(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The drop-in with a tuned plan: the same scheduler, and no warning that the plan is for another one."""
    monkeypatch.chdir(tmp_path)
    seeded = PYTHON[1].replace("num_inference_steps=20)", "num_inference_steps=20, generator=torch.manual_seed(1))")
    assert seeded != PYTHON[1]
    exec(seeded, {"torch": torch})
    assert not [record for record in caplog.records if "tuned" in record.getMessage()]
    words = ["generate", "red apple, 3d style", "--reuse", "tuned:balanced"]
    assert call(capsys, *words, "--seed", "1", "--device", "cpu", "--quiet", "-o", "cli.png")[0] == 0
    assert np.array_equal(Image.open("apple.png"), Image.open("cli.png"))


def test_the_commands_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line gets to where a model is loaded, or to its end where it needs none; the first one draws."""
    monkeypatch.chdir(tmp_path)
    prepare()
    assert len(COMMANDS) >= 12
    first, *others = COMMANDS
    small = ["--device", "cpu", "--quiet", "--steps", "2"]
    assert call(capsys, *shlex.split(first, comments=True), *small)[0] == 0 and Path("apple.png").is_file()
    without_models(monkeypatch)
    for line in others:
        understood(line, capsys)


def test_no_block_is_forgotten() -> None:
    """Both snippets are run above, every line of a console is understood above or run where the table says."""
    assert len(PYTHON) == 2 and {block.kind for block in BLOCKS} == {"python", "console"}
    lines = [line for block in BLOCKS if block.kind == "console" for line in block.lines]
    others = {line.split()[1] for line in lines} - {"diffusion-accel"}
    assert others == {*ELSEWHERE}
