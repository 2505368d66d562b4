"""The code of Markdown pages: blocks, why one is not run, and what commands do up to where a model is loaded."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command import call
from diffusers import DDIMScheduler
from PIL import Image
from solvers import odd

from diffusion_accel.errors import ModelLoadError
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.reuse.plan_family import PlanFamily
from diffusion_accel.reuse.plan_file import TunedPlan

ROOT = Path(__file__).parent.parent
STICKER = str(EMBEDDED["sticker"].path)
OURS = re.compile(r"\$ (?:diffusion-accel|torchrun .*-m diffusion_accel) (.*)")
#: commands that come to their end without a model
NEED_NONE = ("features", "metadata", "inspect", "compose", "models", "info")


@dataclass(frozen=True)
class Block:
    """A block of code, and what the comment before it says why it is not run; empty: it is."""

    kind: str
    text: str
    why_not: str

    @property
    def lines(self) -> list[str]:
        """The commands of a console."""
        return [line for line in self.text.replace("\\\n", "").splitlines() if line.startswith("$ ")]


def blocks(page: Path) -> list[Block]:
    """Every block of code of a page, from above."""
    found = re.findall(r"(?:<!-- not run: (.*?) -->\n)?```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [Block(kind, text, why) for why, kind, text in found]


def commands(found: Iterable[Block]) -> list[str]:
    """What follows `diffusion-accel` in each line of the blocks that are run."""
    lines = [line for block in found if block.kind == "console" and not block.why_not for line in block.lines]
    return [match[1] for line in lines if (match := OURS.match(line))]


def prepare() -> None:
    """What pages take for granted, in the folder of a test: models and prompts."""
    Path("some").mkdir()
    for name in ("model-id", "sdxl"):
        Path("some", name).symlink_to(STICKER, target_is_directory=True)
    Path("prompts.txt").write_text("a red apple\n" * 24)


def without_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a command ends where it would load a model, read its weights or start processes."""

    def load(*args: object, **kwargs: object) -> None:
        raise ModelLoadError("a model would be loaded")

    for place in (
        "diffusion_accel.generation.loading.load_pipeline",
        "diffusion_accel.pipelines.loading.load_pipeline",
        "diffusion_accel.bench.runner.load_pipeline",
        "diffusion_accel.cli.session.load_pipeline",
        "diffusion_accel.cli.processes.start",
        "diffusion_accel.quant.without_data.quantize_files",
    ):
        monkeypatch.setattr(place, load)


def understood(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command gets to where a model is loaded, or to its end where it needs none."""
    name, *words = shlex.split(line, comments=True)
    _made_before(words)
    if name == "estimate" or (name == "inspect" and "sticker-w4a8" in words):
        return  # tests/parallel/test_planning.py, tests/cli/test_quantize.py
    code, out, err = call(capsys, name, *words)
    needs_none = name in NEED_NONE
    assert code == (0 if needs_none else 1), f"{line}: {err}"
    assert out if needs_none else "a model would be loaded" in err, f"{line}: {err}"


def _made_before(words: list[str]) -> None:
    """Write what the lines before this one would have made."""
    if "reuse:plan.json" in words and not Path("plan.json").exists():
        shipped = TunedPlan.load("tuned:quality")
        steps = int(words[words.index("--steps") + 1])
        TunedPlan(shipped.plan.stretched(steps), shipped.conditions).save(Path("plan.json"))
    if any("family.json" in word for word in words) and "-o" not in words[-2:-1]:
        PlanFamily.load("tuned:dpm").save(Path("family.json"), overwrite=True)
    if "panda.png" in words and words[-2:] != ["-o", "panda.png"]:
        Image.new("RGBA", (96, 96), (255, 0, 0, 128)).save("panda.png")
    if "my-solver/" in words and "--scheduler" in words:
        odd(DDIMScheduler.from_pretrained(STICKER, subfolder="scheduler"), 8).save_pretrained("my-solver")
    if "sticker-w4a8" in words and "-o" in words and words[words.index("-o") + 1] != "sticker-w4a8":
        _quantized(Path("sticker-w4a8"))


def _quantized(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    config: dict[str, Any] = {"quantization_config": {"quant_method": "diffusion_accel"}}
    (folder / "config.json").write_text(json.dumps(config))
