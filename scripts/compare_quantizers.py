#!/usr/bin/env python
"""Quantized versions of the embedded model against each other, in one run: error of predictions and PSNR of images.

    diffusion-accel quantize --bits w4a8 -o runs/w4a8          # as many checkpoints as wanted
    pip install torchao optimum-quanto sdnq                    # as many of the others as wanted
    python scripts/compare_quantizers.py runs/w4a8 runs/w4a4 --json runs/quantizers.json

Beside the checkpoints: the same bits without learning (range search, rounding to nearest, grids by timestep), plain
rounding to nearest between minimum and maximum, and what torchao, quanto and SDNQ make of the same model. Images are
on prompts that nothing was calibrated on; everything of ours is simulated, so inputs are rounded as well.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.measure.fidelity import fidelity
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.pipelines.quantizers import load_quantized
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.quant.model import set_runtime
from diffusion_accel.quant.ptq.calibration import CalibrationSet, record, relative_error
from diffusion_accel.quant.ptq.ranges import RangeSettings
from diffusion_accel.quant.ptq.run import quantize_denoiser
from diffusion_accel.quant.ptq.settings import QuantizeSettings, parse_bits
from diffusion_accel.training.images import save_grid

SETTINGS = EMBEDDED["sticker"].settings
OPTIONS = {k: SETTINGS[k] for k in ("guidance_scale", "height", "width")}


def sticker() -> Any:
    """The embedded model as it is recommended to be used."""
    pipe = load_pipeline("sticker")
    set_scheduler(pipe, SETTINGS["scheduler"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def torchao(name: str, **arguments: Any) -> Callable[[Any], None]:
    """A change by torchao with a configuration of its own."""

    def change(unet: Any) -> None:
        import torchao.quantization as ao  # optional package

        ao.quantize_(unet, getattr(ao, name)(**arguments))

    return change


def quanto(weights: str, activations: str | None) -> Callable[[Any, CalibrationSet], None]:
    """A change by quanto, calibrated where inputs are quantized."""

    def change(unet: Any, calibration: CalibrationSet) -> None:
        from optimum import quanto as q  # optional package

        kinds = {"weights": getattr(q, weights), "activations": getattr(q, activations) if activations else None}
        q.quantize(unet, **kinds)
        if activations:
            with q.Calibration():
                for number in range(0, len(calibration.timesteps), 4):
                    calibration.sample(number, 32, 0).run(unet)
        q.freeze(unet)

    return change


def sdnq(weights: str, integer: bool) -> Callable[[Any], None]:
    """A change by SDNQ, with or without products in integers."""

    def change(unet: Any) -> Any:
        from sdnq import sdnq_post_load_quant  # optional package

        return sdnq_post_load_quant(
            unet,
            weights_dtype=weights,
            quant_conv=True,
            use_quantized_matmul=integer,
            use_quantized_matmul_conv=integer,
        )

    return change


OTHERS: dict[str, Callable[..., Any]] = {
    "torchao int8 weight-only (linear layers)": torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic (linear layers)": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao W4A8 dynamic (linear layers)": lambda unet: torchao(
        "Int8DynamicActivationIntxWeightConfig", weight_dtype=torch.int4
    )(unet),
    "quanto W8A8": quanto("qint8", "qint8"),
    "quanto W4A8": quanto("qint4", "qint8"),
    "quanto W4 weight-only": quanto("qint4", None),
    "SDNQ int8, int8 products": sdnq("int8", True),
    "SDNQ uint4, int8 products": sdnq("uint4", True),
    "SDNQ uint4 weight-only": sdnq("uint4", False),
}


def main() -> None:
    """Measure every model on the same prompts, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", help="folders that `diffusion-accel quantize` wrote")
    parser.add_argument("--only", action="store_true", help="nothing but the checkpoints")
    parser.add_argument("--count", type=int, default=32, help="pictures")
    parser.add_argument("--json", type=Path, help="write the full result here as well")
    parser.add_argument("--grid", type=Path, help="write the first images of every row here")
    args = parser.parse_args()
    pipe = sticker()
    full = pipe.unet
    sampler = Sampler(pipe, tuple(embedded_prompts(args.count, skip=1200)), SETTINGS["steps"], 7000, 8, OPTIONS)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(temporary)
        heldout = record(replace(sampler, prompts=tuple(embedded_prompts(16, skip=1100))), 20, folder / "heldout")
        fit = replace(sampler, prompts=tuple(embedded_prompts(72)), seed=0)
        base = sampler.images()
        shown = [("float32", base)]

        def note(name: str, unet: Any) -> None:
            pipe.unet = unet
            parts = [heldout.sample(b, 16, 0) for b in range(0, len(heldout.timesteps), 3)]
            images = sampler.images()
            found = fidelity(base, images)
            rows.append(
                {
                    "name": name,
                    "error": relative_error(unet, parts),
                    "psnr": found.psnr_median,
                    "worst_decile": found.psnr_worst_decile,
                    "ssim": statistics.median(found.ssim),
                }
            )
            shown.append((name, images))
            print(json.dumps(rows[-1]), flush=True)

        wanted = []
        for checkpoint in args.checkpoints:
            pipe.unet = full
            load_quantized(pipe, checkpoint, torch.float32)
            set_runtime(pipe.unet, "simulated")
            recipe = pipe.unet.config["quantization_config"].spec.recipe
            wanted.append(recipe["bits"])
            name = (
                f"ours {recipe['bits']}, {recipe['rounding']}, finetune {recipe['finetune']} ({Path(checkpoint).name})"
            )
            note(name, pipe.unet)
        for bits in dict.fromkeys([] if args.only else wanted):
            try:
                weights, inputs = parse_bits(bits)
            except ValueError:
                continue
            plain = QuantizeSettings(weight_bits=weights, activation_bits=inputs, rounding=None, finetune=None)
            flat = replace(
                plain, search=False, split=False, attention_bits=None, per_channel=False, edge_bits=weights, buckets=1,
                ranges=RangeSettings(percentiles=(100.0,), momentum=None),
            )  # fmt: skip
            for name, settings in (("without learning", plain), ("plain round to nearest", flat)):
                pipe.unet = copy.deepcopy(full)
                run = quantize_denoiser(replace(fit, pipe=pipe), settings, folder / f"{bits} {name}")
                note(f"{bits}, {name}", run.model)
        done = next(folder.glob("*without learning"), None)
        calibration = CalibrationSet(done / "calibration") if done else heldout
        for name, change in ({} if args.only else OTHERS).items():
            unet = copy.deepcopy(full)
            try:
                takes = change.__code__.co_argcount
                unet = change(*(unet, calibration)[:takes]) or unet
                note(name, unet)
            except Exception as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                rows.append({"name": name, "failed": f"{type(error).__name__}: {first}"})
                print(json.dumps(rows[-1]), flush=True)
            gc.collect()
    print(table(rows))
    if args.json:
        args.json.write_text(
            json.dumps({"torch": torch.__version__, "count": args.count, "rows": rows}, indent=1) + "\n"
        )
    if args.grid:
        save_grid(torch.cat([images[:8] for _, images in shown]) * 2 - 1, 8, args.grid)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| model | prediction error | PSNR dB, median | worst decile | SSIM |", "|" + " --- |" * 5]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | failed: {row['failed']} | | | |")
        else:
            numbers = f"{row['error']:.5f} | {row['psnr']:.1f} | {row['worst_decile']:.1f} | {row['ssim']:.3f}"
            lines.append(f"| {row['name']} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
