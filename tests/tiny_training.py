"""The generic trainer as a module, and its arguments for tiny runs."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_diffusion.py"


UNET = {"block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "DownBlock2D"], "norm_num_groups": 4}


UNET |= {"up_block_types": ["UpBlock2D", "UpBlock2D"], "attention_head_dim": 8}


DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}


COLOURS = ("red", "green", "blue")


QUICK = ["--steps", "3", "--batch", "6", "--log-every", "1", "--eval-every", "3", "--grid-every", "0"]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_diffusion", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


trainer = load_script()


def log_of(work: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (work / "train" / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def arguments(data: Path, work: Path, model: str, *more: str) -> list[str]:
    kinds = {"unet": ("folder", "unet.json"), "dit": ("classes", "dit.json"), "unet-text": ("captions", "text.json")}
    kind, config = kinds[model]
    given = ["--data", str(data / kind), "--work", str(work), "--model", model, "--model-config", str(data / config)]
    return [*given, "--size", "16", *QUICK, *more]


def program(log: Path, words: list[str], settings: dict[str, str] | None = None) -> None:
    """The trainer in a process of its own, see `forks`, on the CPU; what it says is appended to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    os.environ.update({"ACCELERATE_USE_CPU": "true"} | (settings or {}))
    sys.exit(trainer.main(words))
