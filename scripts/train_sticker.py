#!/usr/bin/env python3
"""Train the sticker model, a small text-to-image StableDiffusionPipeline, from the sticker data set.

    python scripts/train_sticker.py all --data data/stickers --work runs/sticker --out runs/sticker/pipeline

Stages, each of which reads what the ones before it left in the work folder:
    cache      zips -> one uint8 array
    tokenizer  byte-level BPE in CLIP's format
    latents    principal components of 8x8 patches: the latents of the chosen pictures
    decoder    trains the VAE's decoder
    text       pre-trains the text encoder
    unet       trains the UNet with the text encoder
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
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_accel.errors import AccelerationError
from diffusion_accel.training.files import UsageError, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffusion_accel.training.loop import Settings, Task
    from diffusion_accel.training.sticker_models import Shape

CONCEPTS = Path(__file__).parent / "data" / "sticker_concepts.txt"
STYLES = "noto,flat,3d,twemoji"
GRID_CONCEPTS = "red apple|banana|strawberry|cherries|red heart|blue heart|tiger face|panda|penguin|frog|rainbow|rocket"

# Tuned settings: the budget is what one run of two and a half hours on two cores takes.
DECODER = {"steps": 8000, "batch": 8, "lr": 1.5e-3, "warmup": 50, "cooldown": 0.7, "curve": "cosine"}
DECODER |= {"weight_decay": 1e-3, "eval_every": 500, "grid_every": 2000}
TEXT = {"steps": 2500, "batch": 32, "lr": 1e-3, "beta2": 0.98, "eval_every": 250, "grid_every": 1250}
UNET = {"steps": 8400, "batch": 32, "lr": 1e-3, "warmup": 150, "eval_every": 270, "grid_every": 540}
TUNED: dict[str, dict[str, Any]] = {"decoder": DECODER, "text": TEXT, "unet": UNET}

Stage = Callable[[argparse.Namespace], None]


# ------------------------------------------------------------------------------------------- stages on one process
def shape_of(options: argparse.Namespace) -> Shape:
    from diffusion_accel.training.sticker_models import Shape

    shape = Shape() if options.shape is None else Shape.load(options.shape)
    if shape.size % 8:
        raise UsageError(f"the picture side must be a multiple of 8 pixels, got {shape.size}")
    return shape


def run_cache(options: argparse.Namespace) -> None:
    from diffusion_accel.training.sticker_data import cache_images

    shape = shape_of(options)
    cached = cache_images(options.data, options.work, shape.size)
    write_json(options.work / "shape.json", shape.to_dict())
    report("cache", images=cached)


def run_tokenizer(options: argparse.Namespace) -> None:
    from diffusion_accel.training import sticker_data
    from diffusion_accel.training.sticker_models import Shape

    shape = Shape.of_work(options.work)
    tokenizer = sticker_data.build_tokenizer(options.work, shape.vocabulary, shape.max_length)
    captions = [sticker_data.caption_variants(row)[0] for row in sticker_data.load_rows(options.work) if row["core"]]
    lengths = [len(ids) for ids in tokenizer(captions).input_ids]
    report("tokenizer", vocabulary=len(tokenizer), longest=max(lengths), mean=sum(lengths) / len(lengths))


def run_latents(options: argparse.Namespace) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from diffusion_accel.training import sticker_data
    from diffusion_accel.training.files import replacing
    from diffusion_accel.training.latents import encode_images, fit_codec
    from diffusion_accel.training.sticker_models import Shape

    shape, rows = Shape.of_work(options.work), sticker_data.load_rows(options.work)
    images = sticker_data.load_images(options.work)
    chosen = sticker_data.select(rows, options.styles.split(","), sticker_data.read_concepts(options.concepts))
    fitted = sticker_data.of_split(rows, "train", [i for i, row in enumerate(rows) if row["core"]])
    fitted = np.sort(np.random.default_rng(0).permutation(fitted)[:1500])
    codec = fit_codec(sticker_data.composite(images[fitted]), shape.latent_channels)
    codec.save(options.work / "codec.safetensors")
    latents = encode_images(codec, images, chosen)
    with replacing(options.work / "latents.safetensors") as temporary:
        save_file({"latents": latents, "indices": torch.from_numpy(chosen)}, temporary)
    heldout = len(sticker_data.of_split(rows, "heldout", chosen))
    std = [round(value, 3) for value in codec.std.tolist()]
    report("latents", shape=latents.shape, std=std, train=len(chosen) - heldout, heldout=heldout)


def run_export(options: argparse.Namespace) -> None:
    from diffusion_accel.training.sticker_export import export

    replace = options.overwrite or options.stage == "all"
    report("export", out=str(options.out), **export(options.work, options.out, replace))


def run_grid(options: argparse.Namespace) -> None:
    from diffusion_accel.training.pictures import save_grid
    from diffusion_accel.training.sticker_export import generate, load_pipeline

    names, styles = options.prompts.split("|"), options.styles.split(",")
    prompts = [f"{name}, {style} style" for style in styles for name in names] if options.by_style else names
    pictures = generate(load_pipeline(options.out), prompts, options.sampling_steps, options.guidance, options.seed)
    path = options.grid or options.work / "grid.png"
    save_grid(pictures, min(len(names), options.columns), path)
    report("grid", out=str(path), pictures=len(prompts))


def run_evaluate(options: argparse.Namespace) -> None:
    import torch

    from diffusion_accel.training import sticker_data
    from diffusion_accel.training.pictures import save_grid
    from diffusion_accel.training.sticker_export import evaluate, load_pipeline

    rows, styles = sticker_data.load_rows(options.work), options.styles.split(",")
    chosen = sticker_data.select(rows, styles, sticker_data.read_concepts(options.concepts))
    candidates = sticker_data.select(rows, styles)
    if options.candidates == "starter":
        candidates = candidates[[rows[i].get("starter", False) for i in candidates]]
    pipeline = load_pipeline(options.out)
    result, shown = evaluate(
        pipeline, options.work, chosen, candidates, options.count, options.sampling_steps, options.guidance
    )
    for split, pictures in shown.items():
        pairs = zip(*(part[:48].split(12) for part in pictures.chunk(2)), strict=True)
        grid = torch.cat([part for pair in pairs for part in pair])
        save_grid(grid, min(12, len(pictures) // 2), options.work / f"evaluate-{split}.png")
    write_json(options.work / "evaluate.json", result)
    report("evaluate", **result)


# ------------------------------------------------------------------------------------------- trained stages
def decoder_task(options: argparse.Namespace) -> Task:
    from diffusion_accel.training.sticker_tasks import DecoderTask

    return DecoderTask(options.work, crop=options.crop, noise=options.latent_noise)


def text_task(options: argparse.Namespace) -> Task:
    from diffusion_accel.training.sticker_tasks import TextTask

    return TextTask(options.work)


def unet_task(options: argparse.Namespace) -> Task:
    import torch

    from diffusion_accel.training.diffusion_task import Denoiser, DenoisingTask, Objective
    from diffusion_accel.training.noise import NoiseChoice
    from diffusion_accel.training.state import load_average
    from diffusion_accel.training.sticker_data import load_tokenizer
    from diffusion_accel.training.sticker_models import build_text_encoder, build_unet
    from diffusion_accel.training.sticker_tasks import Captioned, TextTask

    captioned = Captioned.load(options.work)
    torch.manual_seed(0)
    encoder = build_text_encoder(captioned.shape, load_tokenizer(options.work))
    denoiser = Denoiser(build_unet(captioned.shape), encoder)
    if not options.fresh_text:
        pretrained = TextTask(options.work).model
        load_average(options.work / "text", pretrained, "text")
        encoder.load_state_dict(pretrained.text.state_dict())
    noise = NoiseChoice.parse(f"knn:{options.candidate_noises}")
    return DenoisingTask(denoiser, captioned, Objective(noise=noise, uniform=0.4, t_mean=options.t_mean))


def settings_for(stage: str, options: argparse.Namespace) -> Settings:
    """The tuned settings, with what the command line changes."""
    from diffusion_accel.training.loop import Settings

    values = dict(TUNED[stage])
    for field in dataclasses.fields(Settings):
        given = getattr(options, f"{stage}_steps" if field.name == "steps" else field.name, None)
        if given is not None:
            values[field.name] = given
    return Settings(**values)


def run_training(stage: str, options: argparse.Namespace, accelerator: Accelerator) -> None:
    from diffusion_accel.training.loop import train

    folder, task = options.work / stage, {"decoder": decoder_task, "text": text_task, "unet": unet_task}[stage]
    settings = settings_for(stage, options)
    if options.overwrite and not options.resume and accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    outcome = train(task(options), folder, settings, accelerator, resume=options.resume)
    if accelerator.is_main_process:
        processes = accelerator.num_processes
        report(stage, step=outcome.step, steps=settings.steps, finished=outcome.finished, processes=processes)
    if outcome.signal is not None:
        if accelerator.is_main_process:
            print(f"stopped at step {outcome.step}, state saved; --resume goes on from there", file=sys.stderr)
        sys.exit(128 + outcome.signal)


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
ORDER = ("cache", "tokenizer", "latents", "decoder", "text", "unet", "export", "grid", "evaluate")


def report(stage: str, **values: Any) -> None:
    print(json.dumps({"stage": stage} | values), flush=True)


def number(low: float, kind: type = int) -> Callable[[str], Any]:
    """An argparse type: a number that is not below `low`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def add_training_options(parser: argparse.ArgumentParser, stages: list[str]) -> None:
    group = parser.add_argument_group("training")
    for stage in stages:
        flag = "--steps" if len(stages) == 1 else f"--{stage}-steps"
        text = f"budget of the {stage} stage in steps (default: {TUNED[stage]['steps']})"
        group.add_argument(flag, dest=f"{stage}_steps", type=number(1), help=text)
    if len(stages) == 1:
        tuned = TUNED[stages[0]]
        group.add_argument("--batch", type=number(1), help=f"samples per step (default: {tuned['batch']})")
        group.add_argument("--lr", type=number(0, float), help=f"peak learning rate (default: {tuned['lr']})")
        group.add_argument("--cooldown", type=number(0, float), help="share of the budget with a falling rate")
        group.add_argument("--ema", type=number(0, float), help="decay of the averaged weights (default: 0.998)")
    group.add_argument("--minutes", type=number(0, float), help="stop after so long; does not change the schedule")
    group.add_argument("--resume", action="store_true", help="go on from the saved state, if there is one")
    group.add_argument("--save-every", type=number(0, float), help="seconds between saved states (default: 240)")
    group.add_argument("--log-every", type=number(0), help="steps between log lines (default: 50)")
    group.add_argument("--eval-every", type=number(0), help="steps between evaluations, 0 for none but the last")
    group.add_argument("--grid-every", type=number(0), help="steps between preview pictures, 0 for none")
    group.add_argument("--accumulation", type=number(1), default=1, help="micro-batches per step (default: 1)")
    group.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    if "decoder" in stages:
        group.add_argument("--crop", type=number(8), default=48, help="side of the decoder's crops (default: 48)")
        text = "largest latent noise of the decoder's input (default: 0.15)"
        group.add_argument("--latent-noise", type=number(0, float), default=0.15, help=text)
    if "unet" in stages:
        text = "noises to choose the nearest from, 1 for plain noise (default: 4)"
        group.add_argument("--candidate-noises", type=number(1), default=4, help=text)
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
        if whole or stage in ("latents", "evaluate"):
            text = "file with the concepts to train on (default: the 105 of the embedded model)"
            sub.add_argument("--concepts", type=Path, default=CONCEPTS, help=text)
        if whole or stage in ("latents", "evaluate", "grid"):
            sub.add_argument("--styles", default=STYLES, help="styles, separated by commas (default: %(default)s)")
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
            sub.add_argument("--columns", type=number(1), default=12, help="pictures in a row (default: 12)")
            sub.add_argument("--grid", type=Path, help="PNG file to write (default: WORK/grid.png)")
        if whole or stage == "evaluate":
            sub.add_argument("--count", type=number(1), default=96, help="generated pictures per split (default: 96)")
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
        from accelerate import Accelerator

        accelerator = Accelerator(mixed_precision=options.mixed_precision)
        if accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
            text = "warning: the launcher asked for several processes but started one; use torchrun on a CPU"
            print(text, file=sys.stderr)
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
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run(options)
    except AccelerationError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, ValueError) as error:
        print(f"error: {error}".splitlines()[0], file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
