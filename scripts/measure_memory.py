#!/usr/bin/env python3
"""What features cost in memory, and whether many calls leave anything there.

    OMP_NUM_THREADS=1 python scripts/measure_memory.py --json runs/memory.json
    OMP_NUM_THREADS=1 python scripts/measure_memory.py --parts calls --calls 300

- peaks: the most that was resident in a process that draws one image of 256x256 pixels with a pipeline of the shape of
  Stable Diffusion 1.5 (random weights, float32, guidance, 4 steps), a process for each setting. Before the call 3.6 GB
  are weights.
- calls: what is resident after each 50 of --calls calls of one pipeline (the embedded model), each with another size,
  number of steps, scheduler and set of features.
- pipelines: the same after each of --pipelines times loading, accelerating, calling and deleting a pipeline.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKL, ControlNetModel, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.pipelines.controlnet import StableDiffusionControlNetPipeline
from measuring import head, line, quiet, write
from shapes import sd15_unet

from diffusion_accel import Compiled, ControlNetParallel, EncoderReuse, Reuse, TaskRouting, accelerate
from diffusion_accel.measure.memory import process_peak
from diffusion_accel.pipelines.schedulers import set_scheduler

MIB = 2**20
PLAIN, CONTROLNET = "nothing", "a ControlNet, nothing else"
SETTINGS: dict[str, tuple[Any, ...]] = {
    PLAIN: (),
    "reuse hold:2": (Reuse(plan="hold:2"),),
    "reuse hold:2@2": (Reuse(plan="hold:2@2"),),
    "reuse deepcache:2": (Reuse(plan="deepcache:2"),),
    "reuse shallow:2,6@1": (Reuse(plan="shallow:2,6@1"),),
    "reuse uniform:2, decoders in a batch": (Reuse(plan="uniform:2"),),
    "encoder-reuse": (EncoderReuse(schedule="uniform:2"),),
    "task-routing": (TaskRouting(untrained=True),),
    "compiled openvino": (Compiled(cache=False),),
    CONTROLNET: (),
    "controlnet-parallel": (ControlNetParallel(),),
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
CALLED = ["", "hold:2", "hold:3@1", "deepcache:2", "shallow:2,3@1", "uniform:2", "steps"]
SCHEDULERS = ["ddim", "dpm++", "euler", "unipc"]


def peak(setting: str) -> dict[str, float]:
    """Draw in this process: MiB before the call, and at most."""
    torch.set_num_threads(1)
    controlled = setting in (CONTROLNET, "controlnet-parallel")
    unet, vae = sd15_unet(), AutoencoderKL(**VAE).eval()
    parts = {"unet": unet, "vae": vae, "scheduler": DPMSolverMultistepScheduler()}
    parts |= dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    more: dict[str, Any] = {}
    if controlled:
        parts["controlnet"], more = ControlNetModel.from_unet(unet).eval(), {"image": torch.zeros(1, 3, 256, 256)}
    kind = StableDiffusionControlNetPipeline if controlled else StableDiffusionPipeline
    pipe = accelerate(kind(**parts, requires_safety_checker=False), *SETTINGS[setting])
    pipe.set_progress_bar_config(disable=True)
    before = psutil.Process().memory_info().rss / MIB
    texts = torch.randn(2, 1, 77, 768, generator=torch.Generator().manual_seed(0))
    pipe(
        prompt_embeds=texts[0], negative_prompt_embeds=texts[1], height=256, width=256, num_inference_steps=4,
        output_type="pt", **more,
    )  # fmt: skip
    return {"before": before, "peak": (process_peak() or 0) / MIB}


def peaks(names: list[str]) -> list[dict[str, Any]]:
    """A process for each setting."""
    head("setting", "MiB before the call", "at most", "more than without")
    rows: list[dict[str, Any]] = []
    for name in names:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        row = {"part": "peaks", "setting": name, **json.loads(done.splitlines()[-1])}
        rows.append(row)
        beside = CONTROLNET if name == "controlnet-parallel" else PLAIN
        plain = next((other["peak"] for other in rows if other["setting"] == beside), row["peak"])
        line(name, f"{row['before']:.0f}", f"{row['peak']:.0f}", f"{row['peak'] - plain:+.0f}")
    return rows


def call(pipe: Any, choice: random.Random) -> None:
    """One image with settings that nobody would choose."""
    if "reuse" in pipe.acceleration.features:
        pipe.acceleration.remove("reuse")
    set_scheduler(pipe, choice.choice(SCHEDULERS))
    steps, plan = choice.randint(2, 5), choice.choice(CALLED)
    if plan == "steps":
        plan = f"steps:full {' '.join(choice.choice(['full', 'hold', 'hold@1']) for _ in range(steps - 1))}"
    if plan:
        accelerate(pipe, Reuse(plan=plan))
    side, prompt = 8 * choice.randint(4, 9), choice.choice(["red apple", "a panda, 3d style"])
    pipe(prompt, height=side, width=side, num_inference_steps=steps, guidance_scale=choice.choice([1.0, 3.0]))


def calls(count: int) -> list[dict[str, Any]]:
    """One pipeline, many settings."""
    head("calls", "MiB resident")
    pipe, choice, rows = accelerate(quiet("sticker")), random.Random(0), []
    for done in range(1, count + 1):
        call(pipe, choice)
        if done % 50 == 0:
            gc.collect()
            rows.append({"part": "calls", "done": done, "resident": psutil.Process().memory_info().rss / MIB})
            line(done, f"{rows[-1]['resident']:.0f}")
    return rows


def pipelines(count: int) -> list[dict[str, Any]]:
    """Many pipelines, one after the other."""
    head("pipelines", "MiB resident")
    rows = []
    for done in range(1, count + 1):
        pipe = accelerate(quiet("sticker"), Reuse(plan="deepcache:2"))
        pipe("red apple", height=64, width=64, num_inference_steps=3)
        del pipe
        rows.append({"part": "pipelines", "done": done, "resident": psutil.Process().memory_info().rss / MIB})
        line(done, f"{rows[-1]['resident']:.0f}")
    return rows


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=["peaks", "calls", "pipelines"])
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--pipelines", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=list(SETTINGS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(peak(options.one)))
        return
    made = {
        "peaks": lambda: peaks(options.settings),
        "calls": lambda: calls(options.calls),
        "pipelines": lambda: pipelines(options.pipelines),
    }
    rows = list(itertools.chain.from_iterable(made[part]() for part in options.parts or made))
    write(options.json, {}, rows)


if __name__ == "__main__":
    main()
