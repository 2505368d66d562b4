#!/usr/bin/env python
"""An SD 1.5-shaped U-Net (random weights), quantized end to end: size, memory and times of one step by runtime.

    python scripts/measure_quantization.py --work runs/sd15 --json runs/sd15.json

Quantizes to W8A8 without learning, saves, loads in a process of its own with little memory, and times a step with
guidance (two rows) in float32 and with every runtime, in turn, also by type of layer.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from shapes import sd15_unet
from torch import nn

import diffusion_accel  # noqa: F401, so that diffusers loads the checkpoint
from diffusion_accel.measure.memory import process_peak
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.measure.timing import interleaved, ratios, timed
from diffusion_accel.quant.layers import QuantizedConv2d, QuantizedLinear, quantized_layers
from diffusion_accel.quant.model import runtime_report, set_runtime
from diffusion_accel.quant.ptq.ranges import RangeSettings
from diffusion_accel.quant.ptq.run import quantize_denoiser
from diffusion_accel.quant.ptq.settings import QuantizeSettings

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


def by_type(model: nn.Module, run: Any) -> dict[str, float]:
    """Seconds of one forward spent in linear layers and in convolutions."""
    spent = {"linear": 0.0, "convolution": 0.0}
    began: list[float] = []
    handles = []
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            kind = "linear" if isinstance(module, nn.Linear) else "convolution"

            def stop(_m: Any, _a: Any, _o: Any, kind: str = kind) -> None:
                spent[kind] += time.perf_counter() - began.pop()

            handles.append(module.register_forward_pre_hook(lambda *_: began.append(time.perf_counter())))
            handles.append(module.register_forward_hook(stop))
    run()
    for handle in handles:
        handle.remove()
    return spent


def times(full: nn.Module, quantized: nn.Module, latent: int, rounds: int) -> dict[str, Any]:
    """Ratios of one step against float32, whole and by type of layer, from runs in turn."""
    x, text = torch.randn(2, 4, latent, latent), torch.randn(2, 77, 768)
    layers = list(quantized_layers(quantized).values())
    kept = {}
    for name in ("integer", "dequantize", "auto"):
        set_runtime(quantized, name)
        kept[name] = [layer.runtime for layer in layers]
    models = {"float32": full, **dict.fromkeys(kept, quantized)}
    calls = {name: functools.partial(model, x, 500, text) for name, model in models.items()}
    kinds: dict[str, list[dict[str, float]]] = {name: [] for name in calls}

    @contextmanager
    def runtime_of(name: str) -> Iterator[None]:
        for layer, runtime in zip(layers, kept.get(name, []), strict=False):
            layer.runtime = runtime
        yield
        kinds[name].append(by_type(models[name], calls[name]))

    seconds = interleaved(calls, rounds, around=runtime_of)
    kinds = {name: each[1:] for name, each in kinds.items()}  # the first round warms up
    base = seconds["float32"]
    found: dict[str, Any] = {"seconds of float32": statistics.median(base)}
    for name, took in seconds.items():
        ratio = statistics.median(ratios(base, took))
        parts = {
            kind: statistics.median(b[kind] / t[kind] for b, t in zip(kinds["float32"], kinds[name], strict=True))
            for kind in ("linear", "convolution")
        }
        share = {k: statistics.median(t[k] for t in kinds[name]) for k in ("linear", "convolution")}
        found[name] = {"step": ratio, **parts, "seconds": share}
    found["picked"] = {
        kind.__name__: sum(r == "integer" for n, r in runtime_report(quantized).items() if isinstance(m[n], kind))
        for m in [quantized_layers(quantized)]
        for kind in (QuantizedLinear, QuantizedConv2d)
    }
    return found


def main() -> None:
    """Quantize unless that was done, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sd15-quantized"))
    parser.add_argument("--bits", type=int, default=8, help="of the weights")
    parser.add_argument("--latent", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result here as well")
    args = parser.parse_args()
    folder = args.work / f"unet-w{args.bits}"
    result: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": platform.machine()}
    with torch.no_grad():
        if not folder.is_dir():
            pipe = pipeline()
            settings = QuantizeSettings(
                weight_bits=args.bits, buckets=2, rounding=None, finetune=None, ranges=RangeSettings(rows=2, chunk=2)
            )
            sampler, between = Embedded(pipe, ("",) * 2, 3, batch=1), args.work / "between"
            run, seconds = timed(functools.partial(quantize_denoiser, sampler, settings, between))
            run.model.save_pretrained(folder, max_shard_size="20GB")
            result["quantizing"] = {
                "seconds": seconds,
                "peak": process_peak(),
                "stages": run.seconds,
            }
            shutil.rmtree(args.work / "between")
            del pipe, run
        weights = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        child = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
        memory = json.loads(child.stdout.splitlines()[-1])
        full = pipeline().unet
        float32 = 4 * sum(p.numel() for p in full.parameters())
        result["size"] = {"checkpoint": weights, "float32": float32, "ratio": weights / float32}
        result["loading"] = {**memory, "ratio": (memory["peak"] - memory["before"]) / weights}
        print(json.dumps(result, indent=1), flush=True)
        quantized = UNet2DConditionModel.from_pretrained(folder)
        for latent in args.latent:
            result[f"{latent}x{latent}"] = times(full, quantized, latent, args.rounds)
            print(json.dumps(result[f"{latent}x{latent}"], indent=1), flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
