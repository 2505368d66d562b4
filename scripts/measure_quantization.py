#!/usr/bin/env python
"""Quantized layers and whole steps beside float32 and bfloat16: times, and the floor that the machine sets.

    python scripts/measure_quantization.py --json runs/kernels.json
    python scripts/measure_quantization.py --only layers --clock process --threads 1
    python scripts/measure_quantization.py --only checkpoint --work runs/sd15

Layers of the shapes of SD 1.5, SDXL and DiT, and steps with guidance (two rows) of an SD 1.5-shaped U-Net with random
weights, by every way in turn. A floor is what the operations take at the rate of a large product of their type, or the
bytes at that of a copy, whichever is longer. With `--clock process` seconds are those of the processor: on a machine
that does other work, with one thread. `--only checkpoint` calibrates such a U-Net to W8A8, saves it, and loads it in a
process of its own with little memory.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from shapes import sd15_unet
from torch import nn

import diffusion_accel  # noqa: F401, so that diffusers loads the checkpoint
from diffusion_accel.measure.memory import process_peak
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.measure.timing import in_turn, ratios, timed
from diffusion_accel.quant.affine import codes_of, weight_grid
from diffusion_accel.quant.kernels import make_runtime, products
from diffusion_accel.quant.layers import Buckets, QuantizedLayer, quantized_layers, quantized_like
from diffusion_accel.quant.model import candidates, install, set_runtime
from diffusion_accel.quant.ptq.ranges import RangeSettings
from diffusion_accel.quant.ptq.run import quantize_denoiser
from diffusion_accel.quant.ptq.settings import QuantizeSettings
from diffusion_accel.quant.spec import LayerSpec, ModelSpec

LOAD = """
import json, sys
import diffusion_accel
from diffusers import UNet2DConditionModel
from diffusion_accel.quant import loader, model
def memory(key):  # of this process alone, in bytes
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(key))
before = memory('VmRSS')
unet = UNet2DConditionModel.from_pretrained(sys.argv[1])
model.set_runtime(unet, 'dequantize', low_memory=True)
print(json.dumps({'before': before, 'peak': memory('VmHWM'), 'after': memory('VmRSS')}))
"""


class Embedded(Sampler):
    """Images from random embeddings, because there is no text encoder."""

    size = 32

    def call(self, start: int, end: int, **_changes: Any) -> torch.Tensor:
        """Draw latents from the embeddings; the images are not looked at."""
        for number in range(start, end):
            generator = torch.Generator().manual_seed(number)
            self.pipe(
                prompt_embeds=torch.randn(1, 77, 768, generator=generator),
                negative_prompt_embeds=torch.zeros(1, 77, 768),
                num_inference_steps=self.steps,
                height=8 * self.size,
                width=8 * self.size,
                generator=generator,
                output_type="latent",
            )
        return torch.zeros(end - start, 3, 8, 8)


def pipeline() -> Any:
    """A pipeline of that U-Net alone."""
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=sd15_unet(), safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------------- quantized without being calibrated
def quantized_layer(layer: nn.Module, spec: LayerSpec, buckets: Buckets, ends: tuple[float, float]) -> QuantizedLayer:
    """A layer rounded to nearest, its static input grid from `ends`, minimum and maximum: right for times, no more."""
    made = quantized_like(layer, spec, buckets)
    rows = layer.weight.detach().flatten(1)  # type: ignore[union-attr,operator]
    scale, zero = weight_grid(rows, spec, (1.0,), norm=2.0)
    made.store(codes_of(rows, scale, zero, spec).view(made.weight_shape), scale, zero)
    if made.bias is not None:
        made.bias.data.copy_(layer.bias.detach())  # type: ignore[union-attr,operator]
    if spec.activation_bits and not spec.dynamic:
        low, high = min(ends[0], 0.0), max(ends[1], 0.0)
        step = max((high - low) / 255, 1e-9)
        made.store_grids("input", torch.full((1, 1), step), torch.full((1, 1), float(round(-low / step))))
    return made


def quantized_model(model: nn.Module, spec: LayerSpec, ends: dict[str, tuple[float, float]]) -> nn.Module:
    """A copy of a model with all layers quantized alike."""
    static = bool(spec.activation_bits) and not spec.dynamic
    made = copy.deepcopy(model)
    layers = candidates(made)
    buckets = install(made, ModelSpec(dict.fromkeys(layers, spec), (500.0,) if static else ()))
    for name, layer in layers.items():
        made.set_submodule(name, quantized_layer(layer, spec, buckets, ends[name]))
    return made


# ---------------------------------------------------------------------- what the machine can do
def peaks() -> dict[str, float]:
    """Operations a second of large matrix products by type ("float32", "bfloat16", "int8"), and "bytes" a second of a
    copy: the best of a few."""
    n = 2048
    a, b = torch.randn(n, n), torch.randn(n, n)
    low = a.bfloat16(), b.bfloat16()
    x, ones, zeros = torch.randint(0, 255, (n, n), dtype=torch.uint8), torch.ones(n), torch.zeros(n, dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 127, (n, n), dtype=torch.int8), None)
    rest: tuple[Any, ...] = (one := 1.0, 0, torch.float32, "none", [], "")
    large, target = torch.zeros(1 << 26), torch.zeros(1 << 26)
    calls: dict[str, Callable[[], object]] = {
        "float32": lambda: a @ b,
        "bfloat16": lambda: low[0] @ low[1],
        "int8": lambda: torch.ops.onednn.qlinear_pointwise(x, one, 0, packed, ones, zeros, None, *rest),
        "bytes": lambda: target.copy_(large),
    }
    seconds = in_turn({name: functools.partial(clocked, call) for name, call in calls.items()}, 5)
    work = {"bytes": 2.0 * large.nbytes}
    return {name: work.get(name, 2.0 * n**3) / min(took) for name, took in seconds.items()}


def clocked(call: Callable[[], object]) -> float:
    """Seconds of a call, by the clock that was asked for."""
    began = CLOCK[0]()
    call()
    return CLOCK[0]() - began


CLOCK = [time.perf_counter]
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0}  # of a weight


@dataclass(frozen=True)
class Work:
    """One call of a layer: multiplications and additions, weights, values in and out."""

    kind: str
    operations: float
    weights: int
    values: int

    def floor(self, rates: dict[str, float], kind: str) -> float:
        """The least seconds that the products of a type, or the memory, allow."""
        moved = BYTES[kind] * self.weights + 4 * self.values
        return max(self.operations / rates[kind], moved / rates["bytes"])


def work_of(layer: Any, x: torch.Tensor, y: torch.Tensor) -> Work:
    """What a call of a layer took and gave."""
    weights = layer.weight_shape.numel() if isinstance(layer, QuantizedLayer) else layer.weight.numel()
    each = y.shape[0] * y.shape[2] * y.shape[3] if isinstance(layer, nn.Conv2d) else y.numel() // y.shape[-1]
    kind = "convolution" if isinstance(layer, nn.Conv2d) else "linear"
    return Work(kind, 2.0 * weights * each, weights, x.numel() + y.numel())


# ---------------------------------------------------------------------- single layers
#: model, kind, channels in and out, then rows, or side of the image and of the window; two rows of a batch
SHAPES: tuple[tuple[str, str, int, int, int, int], ...] = (
    ("SD 1.5, 64x64", "linear", 320, 320, 8192, 0),
    ("SD 1.5, 64x64", "linear", 320, 2560, 8192, 0),
    ("SD 1.5, 64x64", "linear", 640, 640, 2048, 0),
    ("SD 1.5, 64x64", "linear", 1280, 1280, 512, 0),
    ("SD 1.5, 64x64", "linear", 1280, 10240, 512, 0),
    ("SD 1.5, 64x64", "linear", 768, 1280, 154, 0),
    ("SD 1.5, 64x64", "linear", 1280, 1280, 2, 0),
    ("SD 1.5, 64x64", "convolution", 320, 320, 64, 1),
    ("SD 1.5, 64x64", "convolution", 320, 320, 64, 3),
    ("SD 1.5, 64x64", "convolution", 960, 320, 64, 3),
    ("SD 1.5, 64x64", "convolution", 640, 640, 32, 3),
    ("SD 1.5, 64x64", "convolution", 1280, 1280, 16, 3),
    ("SD 1.5, 64x64", "convolution", 1280, 1280, 8, 3),
    ("SDXL, 128x128", "linear", 640, 640, 8192, 0),
    ("SDXL, 128x128", "linear", 1280, 1280, 2048, 0),
    ("SDXL, 128x128", "linear", 1280, 10240, 2048, 0),
    ("SDXL, 128x128", "linear", 5120, 1280, 2048, 0),
    ("SDXL, 128x128", "linear", 2048, 1280, 154, 0),
    ("SDXL, 128x128", "convolution", 640, 640, 64, 3),
    ("SDXL, 128x128", "convolution", 1280, 1280, 32, 3),
    ("DiT-XL/2, 32x32", "linear", 1152, 1152, 512, 0),
    ("DiT-XL/2, 32x32", "linear", 1152, 4608, 512, 0),
    ("DiT-XL/2, 32x32", "linear", 4608, 1152, 512, 0),
    ("DiT-XL/2, 32x32", "linear", 1152, 6912, 2, 0),
    ("small", "linear", 64, 64, 1024, 0),
    ("small", "linear", 128, 128, 1024, 0),
    ("small", "linear", 256, 256, 1024, 0),
    ("small", "convolution", 32, 32, 32, 3),
    ("small", "convolution", 64, 64, 32, 3),
    ("small", "convolution", 128, 128, 16, 3),
)
W8A8 = LayerSpec(8, activation_bits=8, sqnr=40.0)
#: name -> how the layer is quantized, its runtime, and the type of its products
WAYS: dict[str, tuple[LayerSpec | None, str, str]] = {
    "float32": (None, "", "float32"),
    "bfloat16": (W8A8, "bfloat16", "bfloat16"),
    "W8A8": (W8A8, "integer", "int8"),
    "W8A8 dynamic": (replace(W8A8, dynamic=True), "integer", "int8"),
    "W4A8": (replace(W8A8, weight_bits=4), "integer", "int8"),
    "W4A8 groups": (replace(W8A8, weight_bits=4, weight_group=64, dynamic=True, input_group=32), "auto", "bfloat16"),
    "W8A8 auto": (W8A8, "auto", "int8"),
    "W8A8 dynamic auto": (replace(W8A8, dynamic=True), "auto", "int8"),
}


def layers(rates: dict[str, float], seconds: float, only: str) -> list[dict[str, Any]]:
    """A row for each shape of models whose names begin so: milliseconds of every way in turn, as medians, and how many
    times its floor that is."""
    rows = []
    for model, kind, inside, outside, size, window in (shape for shape in SHAPES if shape[0].startswith(only)):
        is_linear = kind == "linear"
        plain: Any = (
            nn.Linear(inside, outside) if is_linear else nn.Conv2d(inside, outside, window, padding=window // 2)
        )
        x = torch.randn(size, inside) if is_linear else torch.randn(2, inside, size, size)
        calls: dict[str, Callable[[], object]] = {}
        made: dict[str, Any] = {}
        for name, (spec, runtime, _) in WAYS.items():
            if spec is None:
                calls[name] = functools.partial(plain, x)
                continue
            if inside % (spec.input_group or 1):
                continue
            buckets = Buckets(() if spec.dynamic else (500.0,))
            if buckets.timesteps:
                buckets.select(500.0)
            made[name] = quantized_layer(plain, spec, buckets, (-4.0, 4.0))
            made[name].runtime = make_runtime(runtime, made[name])
            calls[name] = functools.partial(made[name], x)
        once = clocked(calls["float32"]) + clocked(calls["float32"])
        rounds = max(3, min(40, int(seconds / (0.5 * len(calls) * once))))
        took = in_turn({name: functools.partial(clocked, call) for name, call in calls.items()}, rounds)
        work = work_of(plain, x, plain(x))
        shape = (
            f"{inside} to {outside}, {size} rows"
            if is_linear
            else f"{inside} to {outside}, {window}x{window}, {size}x{size}"
        )
        row: dict[str, Any] = {"model": model, "kind": kind, "shape": shape, "weights": work.weights, "ways": {}}
        for name, each in took.items():
            runtime = made[name].runtime.name if name in made else ""
            kind_of = {"bfloat16": "bfloat16", "integer": "int8"}.get(runtime, "float32")
            middle = statistics.median(each)
            row["ways"][name] = {
                "ms": 1e3 * middle,
                "ratio": statistics.median(ratios(took["float32"], each)),
                "of floor": middle / work.floor(rates, kind_of),
                "runtime": runtime,
            }
        rows.append(row)
        print(
            line(f"{model} {kind} {shape}", {n: f"{w['ratio']:.2f} {w['runtime']}" for n, w in row["ways"].items()}),
            flush=True,
        )
    return rows


def line(name: str, values: dict[str, str]) -> str:
    """A line for people."""
    return f"{name}: " + ", ".join(f"{key} {value.strip()}" for key, value in values.items())


# ---------------------------------------------------------------------- whole steps
@dataclass
class Spent:
    """Seconds of one forward in linear layers and convolutions, and the work of each of their calls."""

    seconds: dict[str, float]
    work: list[Work]


def by_type(model: nn.Module, run: Callable[[], object]) -> tuple[float, Spent]:
    """The seconds of one forward, whole and by type of layer."""
    spent = Spent({"linear": 0.0, "convolution": 0.0}, [])
    began: list[float] = []

    def stop(module: Any, given: Any, y: Any) -> None:
        took = CLOCK[0]() - began.pop()
        spent.work.append(work_of(module, given[0], y))
        spent.seconds[spent.work[-1].kind] += took

    handles = []
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_pre_hook(lambda *_: began.append(CLOCK[0]())))
            handles.append(module.register_forward_hook(stop))
    try:
        return clocked(run), spent
    finally:
        for handle in handles:
            handle.remove()


def ends_of(model: nn.Module, run: Callable[[], object]) -> dict[str, tuple[float, float]]:
    """The smallest and the largest value that each layer is given in one forward."""
    found: dict[str, tuple[float, float]] = {}
    handles = []
    for name, module in candidates(model).items():

        def note(_m: Any, given: Any, name: str = name) -> None:
            low, high = (float(end) for end in given[0].aminmax())
            found[name] = low, high

        handles.append(module.register_forward_pre_hook(note))
    run()
    for handle in handles:
        handle.remove()
    return found


def steps(latents: list[int], rounds: int, rates: dict[str, float]) -> dict[str, Any]:
    """One step with guidance of an SD 1.5-shaped U-Net by every way, in turn: seconds and ratios to float32, whole and
    by type of layer, and the floor of each type."""
    full = sd15_unet()
    text = torch.randn(2, 77, 768)
    first = torch.randn(2, 4, latents[0], latents[0])
    ends = ends_of(full, lambda: full(first, 500, text))
    static = quantized_model(full, W8A8, ends)
    dynamic = quantized_model(full, replace(W8A8, dynamic=True), ends)
    half = copy.deepcopy(full).bfloat16()
    static_in_half = quantized_model(half, W8A8, ends)
    models: dict[str, tuple[nn.Module, str]] = {
        "float32": (full, ""),
        "bfloat16, whole model": (half, ""),
        "bfloat16": (static, "bfloat16"),
        "integer": (static, "integer"),
        "integer, the rest in bfloat16": (static_in_half, "integer"),
        "auto": (static, "auto"),
        "integer, dynamic": (dynamic, "integer"),
        "auto, dynamic": (dynamic, "auto"),
    }
    kept: dict[str, list[Any]] = {}
    for name, (model, runtime) in models.items():
        if runtime:
            set_runtime(model, runtime)
            kept[name] = [layer.runtime for layer in quantized_layers(model).values()]
    result: dict[str, Any] = {}
    for latent in latents:
        x = torch.randn(2, 4, latent, latent)
        seen: dict[str, list[Spent]] = {name: [] for name in models}

        def step(name: str, x: torch.Tensor = x, seen: dict[str, list[Spent]] = seen) -> float:
            model = models[name][0]
            for layer, runtime in zip(quantized_layers(model).values(), kept.get(name, ()), strict=False):
                layer.runtime = runtime
            kind = next(model.parameters()).dtype
            took, spent = by_type(model, lambda: model(x.to(kind), 500, text.to(kind)))
            seen[name].append(spent)
            return took

        took = in_turn({name: functools.partial(step, name) for name in models}, rounds)
        rows: dict[str, Any] = {}
        for name, each in took.items():
            spent = seen[name][1:]  # the first round warms up
            base = seen["float32"][1:]
            row: dict[str, Any] = {
                "seconds": statistics.median(each),
                "ratio": statistics.median(ratios(took["float32"], each)),
            }
            for kind in ("linear", "convolution"):
                pairs = zip(base, spent, strict=True)
                row[kind] = {
                    "seconds": statistics.median(s.seconds[kind] for s in spent),
                    "ratio": statistics.median(b.seconds[kind] / s.seconds[kind] for b, s in pairs),
                }
            if name in kept:
                row["layers"] = dict(Counter(runtime.name for runtime in kept[name]))
            rows[name] = row
            print(line(f"{latent}x{latent} {name}", {
                "step": f"{row['seconds']:.2f} s x{row['ratio']:.2f}",
                **{kind: f"x{row[kind]['ratio']:.2f}" for kind in ("linear", "convolution")},
            }), flush=True)  # fmt: skip
        work = seen["float32"][-1].work
        floors = {
            kind: {way: sum(one.floor(rates, way) for one in work if one.kind == kind) for way in BYTES}
            for kind in ("linear", "convolution")
        }
        operations = {kind: sum(w.operations for w in work if w.kind == kind) for kind in floors}
        result[f"{latent}x{latent}"] = {"ways": rows, "floors": floors, "operations": operations}
    return result


def checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    """Quantize unless that was done; its minutes, sizes, and the memory of loading it in a process of its own."""
    result: dict[str, Any] = {}
    folder = args.work / f"unet-w{args.bits}"
    if not folder.is_dir():
        pipe = pipeline()
        settings = QuantizeSettings(
            weight_bits=args.bits, buckets=2, rounding=None, finetune=None, ranges=RangeSettings(rows=2, chunk=2)
        )
        sampler, between = Embedded(pipe, ("",) * 2, 3, batch=1), args.work / "between"
        run, seconds = timed(functools.partial(quantize_denoiser, sampler, settings, between))
        run.model.save_pretrained(folder, max_shard_size="20GB")
        result["quantizing"] = {"seconds": seconds, "peak": process_peak(), "stages": run.seconds}
        shutil.rmtree(args.work / "between")
        del pipe, run
    weights = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    child = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    memory = json.loads(child.stdout.splitlines()[-1])
    float32 = 4 * sum(p.numel() for p in sd15_unet().parameters())
    result["size"] = {"checkpoint": weights, "float32": float32, "ratio": weights / float32}
    result["loading"] = {**memory, "ratio": (memory["peak"] - memory["before"]) / weights}
    print(json.dumps(result, indent=1), flush=True)
    return result


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("layers", "steps", "checkpoint"), help="one part; layers and steps else")
    parser.add_argument("--work", type=Path, default=Path("runs/sd15-quantized"))
    parser.add_argument("--bits", type=int, default=8, help="of the weights, of the checkpoint")
    parser.add_argument("--latent", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--rounds", type=int, default=3, help="of steps")
    parser.add_argument("--model", default="", help="layers of models whose names begin so")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape of layers, about")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.clock == "process":
        CLOCK[0] = time.process_time
    result: dict[str, Any] = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "products": products("cpu"),
        "machine": platform.machine(), "clock": args.clock,
    }  # fmt: skip
    with torch.no_grad():
        if args.only == "checkpoint":
            result |= checkpoint(args)
        else:
            result["peaks"] = peaks()
            print(line("peaks", {name: f"{rate / 1e9:.0f} G/s" for name, rate in result["peaks"].items()}), flush=True)
        if args.only in (None, "layers"):
            result["layers"] = layers(result["peaks"], args.seconds, args.model)
        if args.only in (None, "steps"):
            result["steps"] = steps(args.latent, args.rounds, result["peaks"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
