#!/usr/bin/env python3
"""Train the sticker model, a small text-to-image StableDiffusionPipeline, from the sticker data set.

    python scripts/train_sticker.py all --data data/stickers --work runs/sticker --out runs/sticker/pipeline

Stages, each of which reads what the ones before it left in the work folder:
    cache      zips -> one uint8 array
    tokenizer  byte-level BPE in CLIP's format
    latents    principal components of 8x8 patches: the latents of the chosen images
    decoder    trains the VAE's decoder
    text       pre-trains the text encoder
    unet       trains the UNet with the text encoder, on the concept list and the images around it
    finish     goes on from its averaged weights, on the concept list alone
    export     writes the diffusers folder
    grid       writes a grid of samples
    evaluate   prediction error by noise level, and retrieval
    all        all of them, in this order

`decoder` and `text` may run at the same time. Ctrl-C saves the state; the same command with --resume goes on exactly
where it stopped. Two processes on a CPU (`accelerate launch --cpu` starts a single one unless it has mpirun):

    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 scripts/train_sticker.py unet --threads 1

Exit codes: 0 done, 1 failed, 2 wrong arguments, 130 or 143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_accel.training.arguments import (
    add_loop_options,
    add_objective_options,
    add_rate_options,
    exit_if_stopped,
    guarded,
    make_accelerator,
    number,
    objective_from,
    program,
    report,
    routing_from,
    settings_from,
)
from diffusion_accel.training.files import UsageError, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator
    from sticker.models import Shape

    from diffusion_accel.training.loop import Task

CONCEPTS = Path(__file__).parent / "data" / "sticker_concepts.txt"
STYLES = "noto,flat,3d,twemoji"
AROUND = "blob,emojitwo"  # further styles to train on; gradient is left out, a near twin of 3d
GRID_CONCEPTS = "red apple|banana|strawberry|cherries|red heart|blue heart|tiger face|panda|penguin|frog|rainbow|rocket"

# Tuned settings: those of the shipped weights. About eight hours of one core with AMX in bf16.
DECODER = {"steps": 17000, "batch": 16, "lr": 1.5e-3, "warmup": 50, "cooldown": 0.7, "curve": "cosine"}
DECODER |= {"weight_decay": 1e-3, "eval_every": 500, "grid_every": 2000}
TEXT = {"steps": 6000, "batch": 64, "lr": 1e-3, "beta2": 0.98, "eval_every": 200, "grid_every": 1000}
UNET = {"steps": 10000, "batch": 64, "lr": 1e-3, "warmup": 150, "eval_every": 250, "grid_every": 1000}
FINISH = UNET | {"steps": 7000, "lr": 6e-4, "warmup": 50, "cooldown": 1.0, "cycles": 2}
TUNED: dict[str, dict[str, Any]] = {"decoder": DECODER, "text": TEXT, "unet": UNET, "finish": FINISH}

Stage = Callable[[argparse.Namespace], None]


# ------------------------------------------------------------------------------------------- stages on one process
def shape_of(options: argparse.Namespace) -> Shape:
    from sticker.models import Shape

    shape = Shape() if options.shape is None else Shape.load(options.shape)
    if shape.size % 8:
        raise UsageError(f"the image side must be a multiple of 8 pixels, got {shape.size}")
    return shape


def run_cache(options: argparse.Namespace) -> None:
    from sticker.data import cache_images

    shape = shape_of(options)
    cached = cache_images(options.data, options.work, shape.size)
    write_json(options.work / "shape.json", shape.to_dict())
    report("cache", images=cached)


def run_tokenizer(options: argparse.Namespace) -> None:
    from sticker import data as sticker_data
    from sticker.models import Shape

    from diffusion_accel.training import archives

    shape = Shape.of_work(options.work)
    tokenizer = sticker_data.build_tokenizer(options.work, shape.vocabulary, shape.max_length)
    captions = [archives.caption_variants(row)[0] for row in sticker_data.load_rows(options.work) if row["core"]]
    lengths = [len(ids) for ids in tokenizer(captions).input_ids]
    report("tokenizer", vocabulary=len(tokenizer), longest=max(lengths), mean=sum(lengths) / len(lengths))


def run_latents(options: argparse.Namespace) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from sticker import data as sticker_data
    from sticker.latents import encode_images, fit_codec
    from sticker.models import Shape

    from diffusion_accel.training import archives
    from diffusion_accel.training.files import replacing

    shape, rows = Shape.of_work(options.work), sticker_data.load_rows(options.work)
    images = sticker_data.load_images(options.work)
    chosen = sticker_data.select(rows, options.styles.split(","), sticker_data.read_concepts(options.concepts))
    fitted = sticker_data.of_split(rows, "train", [i for i, row in enumerate(rows) if row["core"]])
    fitted = np.sort(np.random.default_rng(0).permutation(fitted)[:1500])
    codec = fit_codec(archives.composite(images[fitted]), shape.latent_channels)
    codec.save(options.work / "codec.safetensors")
    heldout = len(sticker_data.of_split(rows, "heldout", chosen))
    around = np.array([], int)
    if options.around:
        around = sticker_data.surroundings(rows, f"{options.styles},{options.around}".split(","))
        around = np.setdiff1d(sticker_data.of_split(rows, "train", around), chosen)
    indices = np.concatenate([chosen, around])
    latents = encode_images(codec, images, indices)
    stored = {"latents": latents, "indices": torch.from_numpy(indices), "listed": torch.tensor(len(chosen))}
    with replacing(options.work / "latents.safetensors") as temporary:
        save_file(stored, temporary)
    std = [round(value, 3) for value in codec.std.tolist()]
    counts = {"train": len(chosen) - heldout, "heldout": heldout, "around": len(around)}
    report("latents", shape=latents.shape, std=std, **counts)


def run_export(options: argparse.Namespace) -> None:
    from sticker.export import export

    replace = options.overwrite or options.stage == "all"
    report("export", out=str(options.out), **export(options.work, options.out, replace))


def run_grid(options: argparse.Namespace) -> None:
    from sticker.export import generate, load_pipeline

    from diffusion_accel.training.images import save_grid

    styles = options.styles.split(",")
    if options.every:
        return run_every(options, styles)
    names = options.prompts.split("|")
    prompts = [f"{name}, {style} style" for style in styles for name in names] if options.by_style else names
    images = generate(load_pipeline(options.out), prompts, options.sampling_steps, options.guidance, options.seed)
    path = options.grid or options.work / "grid.png"
    save_grid(images, min(len(names), options.columns), path)
    report("grid", out=str(path), images=len(prompts))


def run_every(options: argparse.Namespace, styles: list[str]) -> None:
    """Every concept of the list, a WebP file a style."""
    from sticker import data as sticker_data
    from sticker.export import generate, load_pipeline

    from diffusion_accel.training.images import save_grid

    names = {row["slug"]: row["name"] for row in sticker_data.load_rows(options.work)}
    concepts = [names[slug] for slug in sticker_data.read_concepts(options.concepts)]
    pipeline, folder = load_pipeline(options.out), options.grid or options.work
    for style in styles:
        prompts = [f"{name}, {style} style" for name in concepts]
        images = generate(pipeline, prompts, options.sampling_steps, options.guidance, options.seed)
        save_grid(images, options.columns, folder / f"sticker-{style}.webp")
        report("grid", out=str(folder / f"sticker-{style}.webp"), images=len(prompts))


def run_evaluate(options: argparse.Namespace) -> None:
    import torch
    from sticker import data as sticker_data
    from sticker.export import evaluate, load_pipeline

    from diffusion_accel.training.images import save_grid

    rows, styles = sticker_data.load_rows(options.work), options.styles.split(",")
    chosen = sticker_data.select(rows, styles, sticker_data.read_concepts(options.concepts))
    candidates = sticker_data.select(rows, styles)
    if options.candidates == "starter":
        candidates = candidates[[rows[i].get("starter", False) for i in candidates]]
    pipeline = load_pipeline(options.out)
    result, shown = evaluate(
        pipeline, options.work, chosen, candidates, options.count, options.sampling_steps, options.guidance
    )
    for split, images in shown.items():
        pairs = zip(*(part[:48].split(12) for part in images.chunk(2)), strict=True)
        grid = torch.cat([part for pair in pairs for part in pair])
        save_grid(grid, min(12, len(images) // 2), options.work / f"evaluate-{split}.png")
    write_json(options.work / "evaluate.json", result)
    report("evaluate", **result)


# ------------------------------------------------------------------------------------------- trained stages
def decoder_task(options: argparse.Namespace) -> Task:
    from sticker.tasks import DecoderTask

    return DecoderTask(options.work, crop=options.crop, noise=options.latent_noise)


def text_task(options: argparse.Namespace) -> Task:
    from sticker.tasks import TextTask

    return TextTask(options.work)


def unet_task(options: argparse.Namespace, finishing: bool = False) -> Task:
    import torch
    from sticker.data import load_tokenizer
    from sticker.models import build_text_encoder, build_unet
    from sticker.tasks import Captioned, TextTask

    from diffusion_accel.training.denoising import Process
    from diffusion_accel.training.diffusion_task import Denoiser, DenoisingTask
    from diffusion_accel.training.state import load_average

    captioned = Captioned.load(options.work)
    torch.manual_seed(0)
    encoder = build_text_encoder(captioned.shape, load_tokenizer(options.work))
    denoiser = Denoiser(build_unet(captioned.shape), encoder)
    if not finishing and not options.fresh_text:
        pretrained = TextTask(options.work).model
        load_average(options.work / "text", pretrained, "text")
        encoder.load_state_dict(pretrained.text.state_dict())
    if finishing:
        load_average(options.work / "unet", denoiser, "unet")
        captioned = captioned.listed()
    objective = objective_from(options, Process(), uniform=0.4, t_mean=options.t_mean)
    return DenoisingTask(denoiser, captioned, objective, routing_from(options, Process()))


def finish_task(options: argparse.Namespace) -> Task:
    return unet_task(options, finishing=True)


TASKS = {"decoder": decoder_task, "text": text_task, "unet": unet_task, "finish": finish_task}


def run_training(stage: str, options: argparse.Namespace, accelerator: Accelerator) -> None:
    from diffusion_accel.training.loop import train

    folder, task = options.work / stage, TASKS[stage]
    settings = settings_from(TUNED[stage], options, getattr(options, f"{stage}_steps"))
    if options.overwrite and not options.resume and accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    outcome = train(task(options), folder, settings, accelerator, resume=options.resume)
    if accelerator.is_main_process:
        processes = accelerator.num_processes
        report(stage, step=outcome.step, steps=settings.steps, finished=outcome.finished, processes=processes)
    exit_if_stopped(outcome, accelerator)


# ------------------------------------------------------------------------------------------- command line
ALONE: dict[str, Stage] = {
    "cache": run_cache,
    "tokenizer": run_tokenizer,
    "latents": run_latents,
    "export": run_export,
    "grid": run_grid,
    "evaluate": run_evaluate,
}
LEFT = {"cache": "shape.json", "tokenizer": "tokens.safetensors", "latents": "latents.safetensors"}  # last file of each
ORDER = ("cache", "tokenizer", "latents", "decoder", "text", "unet", "finish", "export", "grid", "evaluate")


def add_training_options(parser: argparse.ArgumentParser, stages: list[str]) -> None:
    group = parser.add_argument_group("training")
    for stage in stages:
        flag = "--steps" if len(stages) == 1 else f"--{stage}-steps"
        text = f"budget of the {stage} stage in steps (default: {TUNED[stage]['steps']})"
        group.add_argument(flag, dest=f"{stage}_steps", type=number(1), help=text)
    if len(stages) == 1:
        add_rate_options(group, TUNED[stages[0]])
    add_loop_options(group)
    if "decoder" in stages:
        group.add_argument("--crop", type=number(8), default=48, help="side of the decoder's crops (default: 48)")
        text = "largest latent noise of the decoder's input (default: 0.3)"
        group.add_argument("--latent-noise", type=number(0, float), default=0.3, help=text)
    if {"unet", "finish"} & set(stages):
        add_objective_options(group, immiscible="knn:4")
        text = "centre of the logit-normal timesteps (default: 0)"
        group.add_argument("--t-mean", type=float, default=0.0, help=text)
        group.add_argument("--fresh-text", action="store_true", help="start from an untrained text encoder")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage in (*ORDER, "all"):
        sub = stages.add_parser(stage, help="every stage in order" if stage == "all" else f"the {stage} stage")
        sub.add_argument("--work", type=Path, default=Path("runs/sticker"), help="work folder (default: %(default)s)")
        sub.add_argument("--threads", type=number(1), help="CPU threads per process (default: torch's choice)")
        sub.add_argument("--seed", type=number(0), default=0, help="seed (default: 0)")
        whole = stage == "all"
        if whole or stage == "cache":
            text = "data set folder (default: %(default)s)"
            sub.add_argument("--data", type=Path, default=Path("data/stickers"), help=text)
            sub.add_argument("--shape", type=Path, help="JSON file with other model sizes than the default ones")
        if whole or stage in ("latents", "evaluate", "grid"):
            text = "file with the concepts to train on (default: the 369 of the embedded model)"
            sub.add_argument("--concepts", type=Path, default=CONCEPTS, help=text)
        if whole or stage in ("latents", "evaluate", "grid"):
            sub.add_argument("--styles", default=STYLES, help="styles, separated by commas (default: %(default)s)")
        if whole or stage == "latents":
            text = "train on every core concept, in these styles too, a third as often; '' for the list alone"
            sub.add_argument("--around", default=AROUND, help=f"{text} (default: %(default)s)")
        if whole or stage in TUNED:
            add_training_options(sub, list(TUNED) if whole else [stage])
        if whole or stage in TUNED or stage == "export":
            sub.add_argument("--overwrite", action="store_true", help="start again, replacing what is there")
        if whole or stage in ("export", "grid", "evaluate"):
            text = "pipeline folder (default: WORK/pipeline)"
            sub.add_argument("--out", "--pipeline", dest="out", type=Path, help=text)
        if whole or stage in ("grid", "evaluate"):
            sub.add_argument("--sampling-steps", type=number(1), default=20, help="DPM-Solver++ steps (default: 20)")
            sub.add_argument("--guidance", type=number(0, float), default=3.0, help="guidance scale (default: 3)")
        if whole or stage == "grid":
            sub.add_argument("--prompts", default=GRID_CONCEPTS, help="prompts or concepts, separated by |")
            text = "take the prompts as they are; otherwise each is drawn in every style"
            sub.add_argument("--plain", dest="by_style", action="store_false", help=text)
            text = "draw every concept of the list instead: a WebP file a style, in the folder --grid"
            sub.add_argument("--every", action="store_true", help=text)
            sub.add_argument("--columns", type=number(1), default=12, help="images in a row (default: 12)")
            sub.add_argument("--grid", type=Path, help="PNG file to write (default: WORK/grid.png)")
        if whole or stage == "evaluate":
            sub.add_argument("--count", type=number(1), default=96, help="generated images per split (default: 96)")
            text = "retrieval looks among the starter or all core concepts (default: starter)"
            sub.add_argument("--candidates", choices=("starter", "core"), default="starter", help=text)
    return parser


def run(options: argparse.Namespace) -> None:
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    names = ORDER if options.stage == "all" else (options.stage,)
    accelerator = None
    if any(name in TUNED for name in names):
        accelerator = make_accelerator(options)
    for name in names:
        if name in TUNED:
            assert accelerator is not None
            run_training(name, options, accelerator)
        elif accelerator is None or accelerator.is_main_process:
            kept = options.stage == "all" and options.resume and name in LEFT and (options.work / LEFT[name]).exists()
            if not kept:
                ALONE[name](options)
        if accelerator is not None:
            accelerator.wait_for_everyone()
    if accelerator is not None:
        accelerator.end_training()


def main(arguments: list[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    if getattr(options, "out", 0) is None:
        options.out = options.work / "pipeline"
    return guarded(run, options)


if __name__ == "__main__":
    program(main)
