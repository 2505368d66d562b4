"""What patch parallelism costs in fidelity, in bytes and in time, measured with real processes on this machine.

    python scripts/measure_patch_parallel.py fidelity --ranks 2 4 -o docs/data/patch-parallel.json \
        --images docs/images/patch-parallel.png
    python scripts/measure_patch_parallel.py fidelity --ranks 2 --model FLUX --scheduler "" --width 96 --height 96 \
        --steps 28 --call '{"true_cfg_scale": 3, "negative_prompt": ""}'
    python scripts/measure_patch_parallel.py time

`fidelity` draws images with a model, the embedded one at a larger canvas if none is named, on one process and on
several with every setting that is for it, and compares them (PSNR in dB). `time` runs steps of a U-Net of SD 1.5's
shape with random weights, in turn, as one process with one thread, two processes with one thread each, and one with two
threads, on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

PROMPTS = ("red apple, 3d style", "panda, flat style", "rocket, 3d style", "tropical fish, flat style")
SETTINGS: list[dict[str, Any]] = [
    {"mode": "sync"},
    *({"mode": "displaced", "warmup": w} for w in (1, 3, 5, 10)),
    {"mode": "displaced", "warmup": 5, "forecast": False},
    {"mode": "partial", "warmup": 5, "forecast": False},
    {"mode": "partial", "warmup": 5},
    *({"mode": "displaced", "warmup": 5, "group_norm": g} for g in ("stale", "sync", "local")),
    *({"mode": "partial", "warmup": 5, "p": p} for p in (0.0, 0.1, 0.5, 1.0)),
    *({"mode": "partial", "warmup": w} for w in (1, 3, 10)),
    {"mode": "naive", "warmup": 0},
    {"mode": "naive", "warmup": 5},
]
SHOWN: dict[str, dict[str, Any]] = {  # in the sheet of images, of the last world
    "sync": {"mode": "sync"},
    "displaced": {"mode": "displaced", "warmup": 5},
    "partial, p=0.3": {"mode": "partial", "warmup": 5},
    "naive": {"mode": "naive", "warmup": 0},
}


def draw(pipe: Any, options: argparse.Namespace, first: int) -> Any:
    """Images (N, 3, H, W) in 0 … 1."""
    import torch

    prompts = [PROMPTS[k % len(PROMPTS)] for k in range(first, first + options.batch)]
    generators = [torch.Generator().manual_seed(1000 + k) for k in range(first, first + options.batch)]
    return pipe(
        prompts,
        num_inference_steps=options.steps,
        width=options.width,
        height=options.height,
        generator=generators,
        output_type="pt",
        **json.loads(options.call),
    ).images.float()


def load(options: argparse.Namespace) -> Any:
    """The pipeline, as every process of a job loads it."""
    from diffusion_accel.pipelines.loading import load_pipeline
    from diffusion_accel.pipelines.schedulers import set_scheduler

    pipe = load_pipeline(options.model)
    if options.scheduler:
        set_scheduler(pipe, options.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fidelity_worker(options: argparse.Namespace) -> None:
    """One process of a world: draws with every setting; rank 0 writes a line for each."""
    import torch

    from diffusion_accel import PatchParallel, accelerate
    from diffusion_accel.measure.fidelity import psnr

    torch.set_num_threads(1)
    pipe = load(options)
    rank = int(os.environ.get("RANK", "0"))
    for settings in SETTINGS:
        if PatchParallel(**settings).supports(pipe) or ("group_norm" in settings and not hasattr(pipe, "unet")):
            continue
        if options.defaults and not (set(settings) <= {"mode", "warmup", "forecast"} and settings.get("warmup") == 5):
            continue
        accelerate(pipe, PatchParallel(timeout=600.0, **settings))
        found, counters, shown = [], {}, []
        for first in range(0, options.count, options.batch):
            images = draw(pipe, options, first)
            shown.append(images)
            plain = torch.load(Path(options.folder) / f"{first}.pt", weights_only=True)
            found += psnr(plain, images).tolist()
            counters = pipe.acceleration.report().counters["patch_parallel"]
        sent = torch.tensor([counters["bytes_per_exact_step"], counters["bytes_per_stale_step"]], dtype=torch.float64)
        torch.distributed.all_reduce(sent)
        if rank == 0:
            for label, one in SHOWN.items():
                if one == settings:
                    torch.save(torch.cat(shown), Path(options.folder) / f"{label}.pt")
            line = {
                "ranks": counters["ranks"],
                **settings,
                "psnr_median": round(min(statistics.median(found), 999), 2),
                "psnr_worst": round(min(*found, 999), 2),
                "bytes_per_exact_step": round(float(sent[0]) / options.batch),
                "bytes_per_stale_step": round(float(sent[1]) / options.batch),
            }
            print(json.dumps(line), flush=True)
            with (Path(options.folder) / "lines.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


def fidelity(options: argparse.Namespace) -> None:
    """Images of every setting against those of one process, and how near steps fewer come."""
    import torch

    from diffusion_accel.parallel.launch import start

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        pipe = load(options)
        for first in range(0, options.count, options.batch):
            torch.save(draw(pipe, options, first), Path(folder) / f"{first}.pt")
        # the anchor beside every number: another way to spend less, one step fewer
        fewer = argparse.Namespace(**{**vars(options), "steps": options.steps - 1})
        from diffusion_accel.measure.fidelity import psnr

        anchor = []
        for first in range(0, options.count, options.batch):
            plain = torch.load(Path(folder) / f"{first}.pt", weights_only=True)
            anchor += psnr(plain, draw(pipe, fewer, first)).tolist()
        print(f"one step fewer: median PSNR {statistics.median(anchor):.2f}", flush=True)
        names = ("model", "steps", "count", "batch", "width", "height", "scheduler", "call")
        flags = [f"--{name}={getattr(options, name)}" for name in names] + ["--defaults"] * options.defaults
        for ranks in options.ranks:
            start(ranks, [__file__, "fidelity-worker", f"--folder={folder}", *flags])
        lines = [json.loads(line) for line in (Path(folder) / "lines.jsonl").read_text().splitlines()]
        if options.images:
            sheet(Path(folder), options)
    if options.output:
        settings = {name: getattr(options, name) for name in names}
        found = {"settings": settings, "one_step_fewer_psnr_median": round(statistics.median(anchor), 2), "runs": lines}
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n")


def sheet(folder: Path, options: argparse.Namespace) -> None:
    """The first images of one process and of the settings in SHOWN, a row each."""
    import torch
    from PIL import Image

    from diffusion_accel.measure.grids import grid

    rows = []
    for name in ("0", *SHOWN):
        made = torch.load(folder / f"{name}.pt", weights_only=True)[: len(PROMPTS)]
        bytes_ = (made.permute(0, 2, 3, 1) * 255).round().clamp(0, 255).byte().numpy()
        rows.append([Image.fromarray(image) for image in bytes_])
    names = ["one process", *(f"{options.ranks[-1]} processes, {label}" for label in SHOWN)]
    grid(rows, [""] * len(rows[0]), [[name] for name in names]).save(options.images)


# ---------------------------------------------------------------------- time
def time_worker(options: argparse.Namespace) -> None:
    """One step after another of a U-Net of SD 1.5's shape, rank 0 printing the seconds of each."""
    import torch
    from diffusers import DDIMScheduler, DDPMPipeline
    from shapes import sd15_unet

    from diffusion_accel import PatchParallel, accelerate
    from diffusion_accel.measure.timing import seconds_of

    torch.set_num_threads(options.threads)
    unet = sd15_unet()

    class Pipeline(DDPMPipeline):
        """Steps of the denoiser alone."""

        @torch.no_grad()
        def __call__(self, steps: int) -> Any:
            self.scheduler.set_timesteps(steps)
            generator = torch.Generator().manual_seed(0)
            latents = torch.randn(options.rows, 4, options.latents, options.latents, generator=generator)
            text = torch.randn(options.rows, 77, 768, generator=generator)
            seconds = []
            for t in self.scheduler.timesteps:

                def step(t: Any = t) -> None:
                    nonlocal latents
                    noise = self.unet(latents, t, text, return_dict=False)[0]
                    latents = self.scheduler.step(noise, t, latents).prev_sample

                seconds.append(seconds_of(step))
            return seconds

    pipe = Pipeline(unet=unet, scheduler=DDIMScheduler())
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    modes: dict[str, dict[str, Any]] = {
        "sync": {"mode": "sync"},
        "displaced": {"mode": "displaced", "warmup": 1},
        "partial": {"mode": "partial", "warmup": 1},
        "branches of guidance": {"mode": "sync", "cfg_parallel": True},
    }
    for label, settings in modes.items() if ranks > 1 else [("plain", {"mode": "sync"})]:
        accelerate(pipe, PatchParallel(timeout=3600.0, **settings))
        unmeasured = 1 + (settings["mode"] != "sync")
        seconds = pipe(options.repeats + unmeasured)[unmeasured:]
        if os.environ.get("RANK", "0") == "0":
            name = f"{ranks} x {options.threads} threads, {label}"
            line = json.dumps({"what": name, "seconds": [round(s, 3) for s in seconds]})
            print(line, flush=True)
            with (Path(options.folder) / "lines.jsonl").open("a") as file:
                file.write(line + "\n")


def measure_time(options: argparse.Namespace) -> None:
    """Times of a step on one process and on several, in turn."""
    from diffusion_accel.parallel.launch import start

    flags = [f"--{name}={getattr(options, name)}" for name in ("latents", "rows", "repeats")]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for ranks, threads in ((1, 1), (2, 1), (1, 2)):
                os.environ["OMP_NUM_THREADS"] = str(threads)
                start(ranks, [__file__, "time-worker", f"--threads={threads}", f"--folder={folder}", *flags])
        lines = [json.loads(line) for line in (Path(folder) / "lines.jsonl").read_text().splitlines()]
    seconds: dict[str, list[float]] = {}
    for line in lines:
        seconds.setdefault(line["what"], []).extend(line["seconds"])
    first = statistics.median(seconds["1 x 1 threads, plain"])
    for what, found in seconds.items():
        median = statistics.median(found)
        print(f"{what}: {median:.2f} s ({min(found):.2f} to {max(found):.2f}, n={len(found)}), {first / median:.2f}x")


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("fidelity", fidelity), ("fidelity-worker", fidelity_worker)):
        one = commands.add_parser(name)
        one.set_defaults(function=function)
        one.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
        one.add_argument("--width", type=int, default=256)
        one.add_argument("--height", type=int, default=256)
        one.add_argument("--steps", type=int, default=20)
        one.add_argument("--count", type=int, default=4)
        one.add_argument("--batch", type=int, default=4)
        one.add_argument("--model", default="sticker")
        one.add_argument("--scheduler", default="ddim", help='"" for the model\'s own')
        one.add_argument("--call", default="{}", help="further arguments of the pipeline's call, as JSON")
        one.add_argument("-o", "--output")
        one.add_argument("--images", "--pictures", help="PNG file for a sheet of images")
        text = "the default settings of displaced and partial alone, with and without forecast"
        one.add_argument("--defaults", action="store_true", help=text)
        one.add_argument("--folder", help=argparse.SUPPRESS)
    for name, function in (("time", measure_time), ("time-worker", time_worker)):
        one = commands.add_parser(name)
        one.set_defaults(function=function)
        one.add_argument("--latents", type=int, default=64)
        one.add_argument("--rows", type=int, default=2, help="2 with guidance, 1 without")
        one.add_argument("--repeats", type=int, default=1, help="measured steps of each kind in a round")
        one.add_argument("--rounds", type=int, default=5)
        one.add_argument("--folder", help=argparse.SUPPRESS)
        one.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
