#!/usr/bin/env python3
"""What task routing costs a denoising step: interleaved times of plain and routed models, as a Markdown table.

python scripts/measure_task_routing.py --runs 15
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diffusion_accel.measure.timing import interleaved, ratios
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.routing import Recipe, route


def models() -> dict[str, tuple[Any, dict[str, Any]]]:
    """The embedded U-Net, an SD 1.5-shaped one, and DiTs in two of the paper's sizes, with the arguments of a step."""
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel
    from shapes import sd15_unet

    def text(width: int, tokens: int = 77) -> torch.Tensor:
        return torch.randn(2, tokens, width)

    sticker = UNet2DConditionModel.from_pretrained(EMBEDDED["sticker"].path / "unet")
    call = {"sample": torch.randn(2, sticker.config.in_channels, 12, 12), "encoder_hidden_states": text(192, 24)}
    found: dict[str, tuple[Any, dict[str, Any]]] = {"sticker U-Net, 12×12 latents": (sticker, call)}
    sd = sd15_unet()
    call = {"sample": torch.randn(2, 4, 32, 32), "encoder_hidden_states": text(768)}
    found["SD 1.5-shaped U-Net, 32×32 latents"] = sd, call
    for name, heads, layers in (("S", 6, 12), ("B", 12, 12)):
        dit = DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=64, num_layers=layers, in_channels=4, out_channels=8
        )
        call = {"hidden_states": torch.randn(2, 4, 32, 32), "class_labels": torch.tensor([1, 1000])}
        found[f"DiT-{name}/2, 32×32 latents"] = dit, call
    return found


@torch.no_grad()
def measure(model: Any, call: dict[str, Any], runs: int) -> list[float]:
    """Routed / plain times of `runs` interleaved pairs, after a warm-up."""
    model.eval()
    step = functools.partial(model, **call, timestep=torch.tensor([700]).expand(2), return_dict=False)

    @contextmanager
    def routed(way: str) -> Iterator[None]:
        hooks = route(model, Recipe()) if way == "routed" else None
        yield
        if hooks is not None:
            hooks.remove()

    seconds = interleaved({"plain": step, "routed": step}, runs, warmup=2, around=routed)
    return ratios(seconds["routed"], seconds["plain"])


def main() -> int:
    """Measure every model, and print a table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    print("| model, batch of 2 | step time, routed / plain: median | quartiles |\n| --- | --- | --- |")
    for name, (model, call) in models().items():
        low, middle, high = statistics.quantiles(measure(model, call, options.runs), n=4)
        print(f"| {name} | {middle:.3f} | {low:.3f} … {high:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
