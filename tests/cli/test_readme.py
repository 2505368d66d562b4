"""The README's snippets do what they say: Python as it stands, commands as far as they are cheap."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from command import call
from diffusers import DDIMScheduler
from PIL import Image
from solvers import odd

from diffusion_accel.errors import ModelLoadError
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.reuse.plan_file import TunedPlan

README = Path(__file__).parents[2] / "README.md"
STICKER = str(EMBEDDED["sticker"].path)
BLOCKS = re.findall(r"```(python|console)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
COMMANDS = [
    line.removeprefix("$ diffusion-accel ")
    for kind, text in BLOCKS
    if kind == "console"
    for line in text.splitlines()
    if line.startswith("$ diffusion-accel ")
]


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
    Path("some").mkdir()
    Path("some/model-id").symlink_to(STICKER, target_is_directory=True)
    Path("prompts.txt").write_text("a red apple\n" * 24)
    shipped = TunedPlan.load("tuned:quality")
    cheap = {"generate": ["--device", "cpu", "--quiet", "--steps", "2"]}

    def load(*args: object, **kwargs: object) -> None:
        raise ModelLoadError("a model would be loaded")

    assert len(COMMANDS) >= 12
    for number, line in enumerate(COMMANDS):
        name, *words = shlex.split(line, comments=True)
        if "reuse:plan.json" in words:  # what the line before it would have made
            steps = int(words[words.index("--steps") + 1])
            TunedPlan(shipped.plan.stretched(steps), shipped.conditions).save(Path("plan.json"))
        if name == "generate" and "my-solver/" in words:
            odd(DDIMScheduler.from_pretrained(STICKER, subfolder="scheduler"), 8).save_pretrained("my-solver")
        if "--quantize" in words:
            Path("sticker-w4a8").mkdir()
            config = {"quantization_config": {"quant_method": "diffusion_accel"}}
            Path("sticker-w4a8/config.json").write_text(json.dumps(config))
        if name == "estimate":
            continue  # tests/parallel/test_planning.py
        if number == 0:
            assert call(capsys, name, *words, *cheap[name])[0] == 0 and Path("apple.png").is_file()
            monkeypatch.setattr("diffusion_accel.generation.loading.load_pipeline", load)
            monkeypatch.setattr("diffusion_accel.pipelines.loading.load_pipeline", load)
            monkeypatch.setattr("diffusion_accel.bench.runner.load_pipeline", load)
            monkeypatch.setattr("diffusion_accel.cli.processes.start", load)
            continue
        code, out, err = call(capsys, name, *words)
        needs_none = name in ("features", "metadata")
        assert code == (0 if needs_none else 1), f"{line}: {err}"
        assert out if needs_none else "a model would be loaded" in err, f"{line}: {err}"
