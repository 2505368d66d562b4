#!/usr/bin/env python3
"""What the add-ons of SwiftDiffusion, a paper on serving, cost and bring: late LoRAs, ControlNets beside the U-Net.

    OMP_NUM_THREADS=1 python scripts/measure_addons.py deadline
    OMP_NUM_THREADS=1 python scripts/measure_addons.py controlnet --rounds 9

- deadline: a LoRA acts from step k on, which is what a request with `lora_deadline=k` is at worst: how near the images
  are to those with the LoRA from the beginning, beside the images without it. The LoRA is made of random numbers, on
  all attention layers of the embedded U-Net, with a scale at which images without it are about --far dB away.
- controlnet: the embedded model with a ControlNet of its own shape with random weights, one after the other and side by
  side: whole images in turn, each of the two on one thread. The images are compared, too.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from measuring import STICKER, head, line, numbers, quiet, short, write
from safetensors.torch import save_file

from diffusion_accel import ControlNetParallel, accelerate
from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.measure.timing import interleaved, ratios
from diffusion_accel.pipelines.schedulers import set_scheduler

STEPS = 20


def write_lora(file: Path, unet: torch.nn.Module) -> None:
    """A LoRA of rank 4 of random numbers for every projection of attention."""
    values, tensors = torch.Generator().manual_seed(0), {}
    for name, layer in unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            rows, columns = layer.weight.shape
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(4, columns, generator=values) / columns**0.5
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(rows, 4, generator=values) / rows**0.5
    save_file(tensors, file)


def images_of(pipe: Any, prompts: list[str], **more: Any) -> torch.Tensor:
    """Images (N, 3, H, W) of prompts, each with a seed of its own."""
    found = []
    for seed, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed)
        found.append(
            pipe(prompt, num_inference_steps=STEPS, generator=generator, output_type="pt", **STICKER, **more).images
        )
    return torch.cat(found)


def deadline(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each step from which on the LoRA acts; None: it never does."""
    pipe = quiet("sticker")
    set_scheduler(pipe, "dpm++")
    prompts = list(embedded_prompts(options.count, skip=1200))
    without = images_of(pipe, prompts)
    with tempfile.TemporaryDirectory() as folder:
        write_lora(Path(folder, "lora.safetensors"), pipe.unet)
        pipe.load_lora_weights(folder, weight_name="lora.safetensors", adapter_name="late")
    scale = 1.0
    for _ in range(8):  # a factor of two is six dB, nearly
        pipe.set_adapters("late", scale)
        wanted = images_of(pipe, prompts)
        away = numbers(wanted, without)["median"]
        if abs(away - options.far) < 0.5:
            break
        scale *= 10 ** ((away - options.far) / 20)

    def acting_from(first: int) -> torch.Tensor:
        def after(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step + 1 == STEPS and first > 0:
                pipe.disable_lora()  # for the next image
            elif step + 1 == first:
                pipe.enable_lora()
            return tensors

        pipe.enable_lora() if first == 0 else pipe.disable_lora()
        return images_of(pipe, prompts, callback_on_step_end=after)

    rows: list[dict[str, Any]] = []
    head("the LoRA acts from step", "PSNR dB to from the beginning: median / worst decile")
    for first in (0, 1, 2, 3, 4, 6, 8, 10, 15, STEPS):
        row = {"first": first, **numbers(wanted, acting_from(first))}
        rows.append(row)
        line("never" if first == STEPS else first, short(row))
    print(f"\nscale {scale:.2f}")
    return rows


def controlnet(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each of the two ways."""
    plain = quiet("sticker")
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(plain.unet)
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.02)
    pipes = {
        name: StableDiffusionControlNetPipeline(**plain.components | {"controlnet": net}, requires_safety_checker=False)
        for name in ("in turn", "beside")
    }
    accelerate(pipes["beside"], ControlNetParallel())
    image = torch.rand(1, 3, STICKER["height"], STICKER["width"], generator=torch.Generator().manual_seed(1))
    made: dict[str, torch.Tensor] = {}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)

    def draw(name: str) -> None:
        made[name] = images_of(pipes[name], ["red apple, 3d style"], image=image)

    seconds = interleaved({name: functools.partial(draw, name) for name in pipes}, options.rounds)
    rows = []
    head("ControlNet", "seconds an image", "ratio", "equal")
    for name, all_of_them in seconds.items():
        own = statistics.median(all_of_them)
        ratio = statistics.median(ratios(seconds["in turn"], all_of_them))
        rows.append({"way": name, "seconds": own, "ratio": ratio, "equal": torch.equal(made[name], made["in turn"])})
        line(name, f"{own:.3f}", f"{ratio:.2f}", rows[-1]["equal"])
    return rows


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["deadline", "controlnet"])
    parser.add_argument("--count", type=int, default=8, help="images of each row of deadline")
    parser.add_argument("--far", type=float, default=20.0, help="dB of images without the LoRA")
    parser.add_argument("--rounds", type=int, default=9, help="images of each way of controlnet")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    with torch.no_grad():
        write(options.json, settings, {"deadline": deadline, "controlnet": controlnet}[options.what](options))


if __name__ == "__main__":
    main()
