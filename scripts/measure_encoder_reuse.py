"""Measure encoder reuse on the embedded model: cost, fidelity and its anchors, as a Markdown table and JSON.

    python scripts/measure_encoder_reuse.py                 # the table of docs/encoder-reuse.md
    python scripts/measure_encoder_reuse.py --sd15          # step times of an SD 1.5-shaped U-Net (random weights)
    python scripts/measure_encoder_reuse.py --schedulers    # every scheduler that fits the model

Fidelity is paired: the same prompts and seeds, everything equal but the setting. Times come from interleaved runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from shapes import sd15_unet

from diffusion_accel import AccelerationError, EncoderReuse, Feature, Reuse, accelerate
from diffusion_accel.flops import count_flops
from diffusion_accel.measure.fidelity import psnr, spread, ssim
from diffusion_accel.measure.timing import interleaved, ratios
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.reuse.plan_names import LEVELS

SUBJECTS = (
    "red apple, banana, strawberry, pizza, hamburger, birthday cake, cat face, dog face, tiger face, panda, penguin, "
    "octopus, red heart, rocket, sunflower, rainbow"
).split(", ")
PROMPTS = [f"{subject}, {style} style" for style in ("3d", "noto") for subject in SUBJECTS]


class Trajectory:
    """A pipeline that samples all prompts and keeps the images and the latents of every step."""

    def __init__(self, steps: int, guidance: float) -> None:
        self.pipe = load_pipeline("sticker")
        self.pipe.set_progress_bar_config(disable=True)
        self.ddim = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.steps, self.guidance = steps, guidance

    def call(self, prompts: list[str], seed: int, steps: int | None = None, **more: Any) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1]; image k starts from the noise of seed + k."""
        generator = [torch.Generator().manual_seed(seed + k) for k in range(len(prompts))]
        return self.pipe(
            prompts,
            num_inference_steps=steps or self.steps,
            guidance_scale=self.guidance,
            generator=generator,
            output_type="pt",
            **more,
        ).images

    def sample(self, seed: int = 0, steps: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 3, H, W) in [0, 1] and latents (steps, N, C, h, w)."""
        images, latents = [], []
        for i in range(0, len(PROMPTS), 16):
            path: list[torch.Tensor] = []

            def keep(
                _pipe: Any, _k: int, _t: Any, values: dict[str, Any], path: list[torch.Tensor] = path
            ) -> dict[str, Any]:
                path.append(values["latents"].clone())
                return values

            images.append(self.call(PROMPTS[i : i + 16], seed + i, steps, callback_on_step_end=keep))
            latents.append(torch.stack(path))
        return torch.cat(images), torch.cat(latents, 1)


def speeds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median over rounds of (the baseline's seconds / this call's seconds in the same round)."""
    seconds = interleaved(calls, rounds)
    return {name: statistics.median(ratios(seconds["baseline"], own)) for name, own in seconds.items()}


def with_plan(pipe: Any, feature: Feature | None, call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` with `feature` and nothing else switched on first."""

    def switched() -> Any:
        if getattr(pipe, "acceleration", None) is not None:
            pipe.acceleration.remove()
        if feature is not None:
            accelerate(pipe, feature)
        return call()

    return switched


def flops(call: Callable[[], Any]) -> float:
    """Operations of a call."""
    with count_flops() as count:
        call()
    return count.total


def machine() -> str:
    """What it was measured on, in a few words."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, float32, torch {torch.__version__}"


def measure_sticker(steps: int, guidance: float, rounds: int) -> dict[str, Any]:
    """Times and fidelity of every setting on the embedded model, with its anchors."""
    run = Trajectory(steps, guidance)
    pipe = run.pipe
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(run.ddim.config)
    converged, _ = run.sample(steps=200)
    pipe.scheduler = run.ddim
    base, base_path = run.sample()
    accelerate(pipe, EncoderReuse())
    plans: dict[str, EncoderReuse] = {
        "uniform:4, batched (default)": EncoderReuse(),
        "uniform:4, sequential": EncoderReuse(batch_decoder=False),
        "uniform:2, batched": EncoderReuse(schedule="uniform:2"),
        "paper, batched": EncoderReuse(schedule="paper"),
        "paper, sequential": EncoderReuse(schedule="paper", batch_decoder=False),
        "paper, batched, prior noise 0.003": EncoderReuse(schedule="paper", prior_noise=0.003),
    }

    def one_image() -> torch.Tensor:
        return run.call(PROMPTS[:1], 0)

    calls = {"baseline": with_plan(pipe, None, one_image)}
    calls |= {name: with_plan(pipe, plan, one_image) for name, plan in plans.items()}
    speed = speeds(calls, rounds)
    base_flops = flops(calls["baseline"])
    rows: list[dict[str, Any]] = []

    def row(name: str, images: torch.Tensor, path: torch.Tensor | None, **more: Any) -> None:
        p, s, c = psnr(base, images), ssim(base, images), psnr(converged, images)
        entry = {"setting": name, "psnr": spread(p), "ssim": spread(s)}
        entry["converged_psnr"] = float(c.median())
        if path is not None and path.shape == base_path.shape:
            entry["latent_error"] = [
                round(float((a - b).norm() / b.norm()), 5) for a, b in zip(path, base_path, strict=True)
            ]
        rows.append({**entry, **more})

    row("baseline", base, None, time_ratio=1.0, flop_ratio=1.0)
    for name, plan in plans.items():
        accelerate(pipe, plan)
        images, path = run.sample()
        counters = pipe.acceleration.report().counters["encoder_reuse"]
        work = {"time_ratio": speed[name], "flop_ratio": base_flops / flops(calls[name]), "counters": counters}
        row(name, images, path, **work)
    pipe.acceleration.disable()
    fewer = {"one step fewer": steps - 1}
    for name in ("paper, batched", "uniform:4, batched (default)"):
        short = name.split(",")[0]
        ratio = next(r["flop_ratio"] for r in rows if r["setting"] == name)
        fewer[f"fewer steps, FLOPs of {short}"] = round(steps / ratio)
        fewer[f"fewer steps, time of {short}"] = round(steps / speed[name])
    for name, count in fewer.items():
        images = run.sample(steps=max(1, count))[0]
        row(f"{name} ({count})", images, None, time_ratio=steps / count, flop_ratio=steps / count)
    row("another seed", run.sample(seed=1000)[0], None, time_ratio=1.0, flop_ratio=1.0)
    return {
        "what": f"sticker, DDIM {steps} steps, guidance {guidance}, {len(PROMPTS)} prompts, batch 1 for times",
        "machine": machine(),
        "rounds": rounds,
        "rows": rows,
    }


def measure_sd15(latent: int, rounds: int, steps: int = 10) -> dict[str, Any]:
    """An SD 1.5-shaped U-Net with random weights: the same code at the real size, with guidance."""
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=sd15_unet(), scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": torch.randn(1, 77, 768), "negative_prompt_embeds": torch.randn(1, 77, 768)}
    size = latent * pipe.vae_scale_factor
    plans: dict[str, Feature | None] = {
        "baseline": None,
        "all key steps (hook overhead)": EncoderReuse.neutral(),
        "reuse full (hook overhead)": Reuse(plan="full"),
        "reuse deepcache:3": Reuse(plan="deepcache:3"),
        "reuse hold:2": Reuse(plan="hold:2"),
        "reuse hold:2, every other full step without guidance": Reuse(plan="hold:2", guidance="reuse:4"),
        "reuse hold:3": Reuse(plan="hold:3"),
        **{f"reuse tuned:{level}, stretched": Reuse(plan=f"tuned:{level}", stretch=True) for level in LEVELS},
        "uniform:5, sequential": EncoderReuse(schedule="uniform:5", batch_decoder=False),
        "uniform:5, batched": EncoderReuse(schedule="uniform:5"),
    }

    def sample() -> Any:
        generator = torch.Generator().manual_seed(0)
        more = {"height": size, "width": size, "generator": generator, "output_type": "latent"}
        return pipe(num_inference_steps=steps, guidance_scale=7.5, **embeds, **more).images

    calls = {name: with_plan(pipe, plan, sample) for name, plan in plans.items()}
    speed = speeds(calls, rounds)
    counted = {name: flops(call) for name, call in calls.items()}
    rows = [{"setting": n, "time_ratio": speed[n], "flop_ratio": counted["baseline"] / counted[n]} for n in plans]
    what = f"SD 1.5-shaped U-Net, random weights, {latent}x{latent} latents, guidance, {steps} DDIM steps"
    return {"what": what, "machine": machine(), "rounds": rounds, "rows": rows}


def measure_schedulers(steps: int, guidance: float) -> str:
    """Every compatible scheduler, against its own baseline: a Markdown table."""
    run = Trajectory(steps, guidance)
    pipe, prompts = run.pipe, PROMPTS[:8]
    head = ["scheduler", "encoder reuse", f"U-Net calls at {steps} steps", "encoder runs", "PSNR dB", "prior noise"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    paper = EncoderReuse(schedule="paper")
    accelerate(pipe, paper)
    for scheduler in sorted(pipe.scheduler.compatibles, key=lambda c: c.__name__):
        name = scheduler.__name__
        try:
            images = []
            for enabled in (False, True):
                pipe.scheduler = scheduler.from_config(run.ddim.config)
                pipe.acceleration.enable() if enabled else pipe.acceleration.disable()
                images.append(run.call(prompts, 0))
            report = pipe.acceleration.report()
            runs = report.counters["encoder_reuse"]["encoder_runs"]
            try:
                accelerate(pipe, EncoderReuse(schedule="paper", prior_noise=0.003))
                run.call(prompts[:1], 0, 5)
                noise = "yes"
            except AccelerationError:
                noise = "refused: latents scaled by sigma"
            accelerate(pipe, paper)
            quality = float(psnr(*images).median())
            lines.append(f"| {name} | yes | {report.steps} | {runs:g} | {quality:.1f} | {noise} |")
        except ImportError as error:
            lines.append(f"| {name} | not tried: {str(error).splitlines()[0].strip()} | | | | |")
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """The result as Markdown tables."""
    fidelity = "psnr" in result["rows"][0]
    head = ["setting", "time ratio", "FLOP ratio"]
    if fidelity:
        head += ["PSNR dB median (worst decile)", "SSIM median (worst decile)", "PSNR dB to converged"]
    lines = [f"{result['what']}; {result['machine']}; {result['rounds']} interleaved rounds.", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in result["rows"]:
        cells = [r["setting"], f"{r['time_ratio']:.2f}", f"{r['flop_ratio']:.2f}"]
        if fidelity:
            same = r["setting"] == "baseline"
            cells += ["-"] * 2 if same else [f"{r['psnr'][0]:.1f} ({r['psnr'][1]:.1f})"]
            cells += [] if same else [f"{r['ssim'][0]:.3f} ({r['ssim'][1]:.3f})"]
            cells.append(f"{r['converged_psnr']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    paths = {r["setting"]: r["latent_error"] for r in result["rows"] if any(r.get("latent_error", ()))}
    if paths:
        count = len(next(iter(paths.values())))
        at = sorted({max(1, round(count * share)) for share in (0.1, 0.25, 0.5, 0.75, 1.0)})
        lines += ["", "Relative L2 error of the latents after step …", ""]
        lines += ["| setting | " + " | ".join(map(str, at)) + " |", "|" + " --- |" * (len(at) + 1)]
        for name, errors in paths.items():
            lines.append(f"| {name} | " + " | ".join(f"{errors[i - 1]:.4f}" for i in at) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved timing rounds")
    parser.add_argument("--sd15", action="store_true", help="the SD 1.5-shaped U-Net instead")
    parser.add_argument("--schedulers", action="store_true", help="every compatible scheduler instead")
    parser.add_argument("--latent", type=int, default=32, help="latent size for --sd15")
    parser.add_argument("--json", type=Path, help="write the full result here as well")
    args = parser.parse_args()
    with torch.inference_mode():
        if args.schedulers:
            print(measure_schedulers(args.steps, args.guidance))
            return
        if args.sd15:
            result = measure_sd15(args.latent, args.rounds)
        else:
            result = measure_sticker(args.steps, args.guidance, args.rounds)
    print(markdown(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
