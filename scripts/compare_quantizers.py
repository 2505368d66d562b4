#!/usr/bin/env python
"""Quantized versions of an embedded model against each other, in one run: sizes, errors of predictions, PSNR of images.

    diffusion-accel quantize --bits w4a8 -o runs/w4a8          # as many checkpoints as wanted
    pip install torchao optimum-quanto sdnq gguf               # as many of the others as wanted
    python scripts/compare_quantizers.py runs/w4a8 runs/w4a4 --json runs/quantizers.json --plot runs/sizes.svg

Beside the checkpoints: with --plain the same bits without learning (range search, rounding to nearest, grids by
timestep) and plain rounding to nearest between minimum and maximum; and what torchao, quanto, SDNQ and GGUF make of the
same model. Images are on prompts that nothing was calibrated on; everything of ours is simulated, so inputs are rounded
as well. Sizes are those of all tensors of the denoiser (of ours, of the file) as a part of float32.
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

from diffusion_accel.bench.report import Axes
from diffusion_accel.conditioning import own_arguments
from diffusion_accel.denoisers import denoiser_names
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


def embedded(name: str) -> tuple[Any, dict[str, Any], int]:
    """An embedded model as it is recommended to be used: the pipeline, options of its calls, and steps."""
    pipe, settings = load_pipeline(name), EMBEDDED[name].settings
    if settings.get("scheduler"):
        set_scheduler(pipe, settings["scheduler"])
    pipe.set_progress_bar_config(disable=True)
    options = {key: settings[key] for key in ("guidance_scale", "height", "width")}
    return pipe, own_arguments(pipe, options), settings["steps"]


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, of one made of others those of all."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(size_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def size_of_model(model: torch.nn.Module) -> int:
    """Bytes of what is saved of a model."""
    return sum(size_of(value) for value in model.state_dict().values() if isinstance(value, torch.Tensor))


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


def gguf(kind: str) -> Callable[[Any], Any]:
    """The weights of linear layers and convolutions as GGUF stores them; inputs as they are. Diffusers loads such files
    for some models only, so the package's own routines write and read them here.

    The change returns the model and the bytes that it saves."""

    def change(unet: Any) -> Any:
        from gguf import GGMLQuantizationType  # optional package
        from gguf.quants import dequantize, quantize

        stored, saved = GGMLQuantizationType[kind], 0
        for module in unet.modules():
            for name, values in module.named_parameters(recurse=False):
                rows = values.detach().flatten(1) if values.dim() > 1 else values.detach()[None]
                if (
                    isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
                    and name == "weight"
                    and not rows.shape[1] % 32
                ):
                    packed = quantize(rows.numpy(), stored)
                    values.copy_(torch.from_numpy(dequantize(packed, stored).copy()).view_as(values))
                    saved += packed.nbytes
                else:
                    saved += 4 * values.numel()
        return unet, saved

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
    **{f"GGUF {kind}": gguf(kind) for kind in ("Q8_0", "Q5_1", "Q4_1", "Q4_0")},
}


def main() -> None:
    """Measure every model on the same prompts, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", help="folders that `diffusion-accel quantize` wrote")
    parser.add_argument("--model", choices=list(EMBEDDED), default="sticker")
    parser.add_argument("--only", action="store_true", help="nothing but the checkpoints")
    parser.add_argument("--plain", action="store_true", help="their bits without learning as well")
    parser.add_argument("--count", type=int, default=32, help="images")
    parser.add_argument("--plot", type=Path, help="write PSNR over size as SVG")
    parser.add_argument("--json", type=Path, help="write the full result here as well")
    parser.add_argument("--grid", type=Path, help="write the first images of every row here")
    args = parser.parse_args()
    pipe, options, steps = embedded(args.model)
    part = denoiser_names(pipe)[0]
    full = getattr(pipe, part)
    whole = 4 * sum(values.numel() for values in full.parameters())
    sampler = Sampler(pipe, tuple(embedded_prompts(args.count, skip=1200)), steps, 7000, 8, options)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(temporary)
        heldout = record(replace(sampler, prompts=tuple(embedded_prompts(16, skip=1100))), 20, folder / "heldout")
        fit = replace(sampler, prompts=tuple(embedded_prompts(72)), seed=0)
        base = sampler.images()
        shown = [("float32", base)]

        def note(name: str, unet: Any, size: int | None = None) -> None:
            setattr(pipe, part, unet)
            parts = [heldout.sample(b, 16, 0) for b in range(0, len(heldout.timesteps), 3)]
            images = sampler.images()
            found = fidelity(base, images)
            rows.append(
                {
                    "name": name,
                    "size": round((size_of_model(unet) if size is None else size) / whole, 4),
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
            setattr(pipe, part, full)
            load_quantized(pipe, checkpoint, torch.float32)
            model = getattr(pipe, part)
            set_runtime(model, "simulated")
            recipe = model.config["quantization_config"].spec.recipe
            wanted.append(recipe["bits"])
            size = sum(file.stat().st_size for file in Path(checkpoint, part).glob("*.safetensors"))
            note(f"ours: {Path(checkpoint).name}", model, size)
        for bits in dict.fromkeys(wanted if args.plain else []):
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
                setattr(pipe, part, copy.deepcopy(full))
                run = quantize_denoiser(replace(fit, pipe=pipe), settings, folder / f"{bits} {name}")
                note(f"{bits}, {name}", run.model)
        done = next(folder.glob("*without learning"), None)
        calibration = CalibrationSet(done / "calibration") if done else heldout
        for name, change in ({} if args.only else OTHERS).items():
            unet = copy.deepcopy(full)
            try:
                takes = change.__code__.co_argcount
                made = change(*(unet, calibration)[:takes]) or unet
                note(name, *made) if isinstance(made, tuple) else note(name, made)
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
    if args.plot:
        args.plot.write_text(plot(rows), encoding="utf-8")
    if args.grid:
        save_grid(torch.cat([images[:8] for _, images in shown]) * 2 - 1, 8, args.grid)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| model | of float32 | prediction error | PSNR dB, median | worst decile | SSIM |", "|" + " --- |" * 6]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | failed: {row['failed']} | | | | |")
        else:
            numbers = f"{row['error']:.5f} | {row['psnr']:.1f} | {row['worst_decile']:.1f} | {row['ssim']:.3f}"
            lines.append(f"| {row['name']} | {row['size']:.3f} | {numbers} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]]) -> str:
    """PSNR over size, ours in another colour; the dashed line is what is the nearest at its size."""
    points = sorted((row["size"], row["psnr"], row["name"]) for row in rows if "size" in row)
    axes = Axes(
        [x for x, *_ in points],
        [y for _, y, _ in points],
        "PSNR dB, median",
        "of float32",
        (0.12, 0.15, 0.2, 0.25, 0.3, 0.5, 1),
    )
    front = [point for point in points if all(point[1] > y for x, y, _ in points if x < point[0])]
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (axes.at(x, y) for x, y, _ in front))
    axes.svg.add("polyline", points=places, class_="front")
    for x, y, name in points:
        across, down = axes.at(x, y)
        axes.svg.add("circle", cx=across, cy=down, r="5", fill="#c33" if name.startswith("ours") else "#47c", tip=name)
    taken: list[tuple[float, float, float]] = []  # where names are: from, to, how far down
    for x, y, name in points:
        across, down = axes.at(x, y)
        left, width = across > axes.svg.width * 0.7, 5.2 * len(name)
        start = across - 8 - width if left else across + 8
        for lower in (4, -9, 17, -22, 30):
            if all(start > to or start + width < at or abs(down + lower - there) > 11 for at, to, there in taken):
                break
        taken.append((start, start + width, down + lower))
        axes.svg.text(across - 8 if left else across + 8, down + lower, name, "end" if left else "start", class_="name")
    return str(axes.svg)


if __name__ == "__main__":
    sys.exit(main())
