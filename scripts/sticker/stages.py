"""The stages of the sticker model: each reads what the ones before it left in the work folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import save_file
from training_options import report, routing_from
from training_setup import make_accelerator, objective_from, train_stage

from diffusion_accel.quant.kernels import AMX, products
from diffusion_accel.training import archives
from diffusion_accel.training.diffusion_task import DenoisingTask
from diffusion_accel.training.files import UsageError, replacing, write_json
from diffusion_accel.training.images import save_grid
from diffusion_accel.training.loop import Task
from diffusion_accel.training.state import load_average

from . import data
from .export import denoiser_of, evaluate, export, generate, load_pipeline, load_text_encoder, load_weights
from .flux import FluxDenoiser
from .latents import encode_images, fit_codec
from .models import Shape
from .settings import ORDER, TUNED
from .tasks import Captioned, DecoderTask, TextTask

Stage = Callable[[argparse.Namespace], None]


# ------------------------------------------------------------------------------------------- stages on one process
def shape_of(options: argparse.Namespace) -> Shape:
    """The sizes that the options ask for. Raises `UsageError` if images are no multiple of 8 pixels."""
    shape = Shape() if options.shape is None else Shape.load(options.shape)
    if shape.size % 8:
        raise UsageError(f"the image side must be a multiple of 8 pixels, got {shape.size}")
    return shape


def run_cache(options: argparse.Namespace) -> None:
    """Unpack the data set into one array."""
    shape = shape_of(options)
    cached = data.cache_images(options.data, options.work, shape.size)
    write_json(options.work / "shape.json", shape.to_dict())
    report("cache", images=cached)


def run_tokenizer(options: argparse.Namespace) -> None:
    """Train the tokenizer, and tokenize every caption."""
    shape = Shape.of_work(options.work)
    tokenizer = data.build_tokenizers(options.work, shape)
    captions = [archives.caption_of(row) for row in data.load_rows(options.work) if row["core"]]
    lengths = [len(ids) for ids in tokenizer(captions).input_ids]
    report("tokenizer", vocabulary=len(tokenizer), longest=max(lengths), mean=sum(lengths) / len(lengths))


def run_latents(options: argparse.Namespace) -> None:
    """Fit the patch codec, choose the images, and encode them."""
    shape, rows = Shape.of_work(options.work), data.load_rows(options.work)
    images = data.load_images(options.work)
    chosen = data.select(rows, options.styles.split(","), data.read_concepts(options.concepts))
    fitted = data.of_split(rows, "train", [i for i, row in enumerate(rows) if row["core"]])
    fitted = np.sort(np.random.default_rng(0).permutation(fitted)[:1500])
    codec = fit_codec(archives.on_colours(images[fitted]), shape.latent_channels, shape.patch)
    codec.save(options.work / "codec.safetensors")
    heldout = len(data.of_split(rows, "heldout", chosen))
    around = np.array([], int)
    if options.around:
        around = data.surroundings(rows, f"{options.styles},{options.around}".split(","))
        around = np.setdiff1d(data.of_split(rows, "train", around), chosen)
    indices = np.concatenate([chosen, around])
    latents = encode_images(codec, images, indices)
    stored = {"latents": latents, "indices": torch.from_numpy(indices), "listed": torch.tensor(len(chosen))}
    with replacing(options.work / "latents.safetensors") as temporary:
        save_file(stored, temporary)
    std = [round(value, 3) for value in codec.std.tolist()]
    counts = {"train": len(chosen) - heldout, "heldout": heldout, "around": len(around)}
    report("latents", shape=latents.shape, std=std, **counts)


def run_export(options: argparse.Namespace) -> None:
    """Write the pipeline folder."""
    overwrite = options.overwrite or options.stage == "all"
    report("export", out=str(options.out), **export(options.work, options.out, overwrite))


def run_grid(options: argparse.Namespace) -> None:
    """Draw a grid of samples."""
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
    names = {row["slug"]: row["name"] for row in data.load_rows(options.work)}
    concepts = [names[slug] for slug in data.read_concepts(options.concepts)]
    pipeline, folder = load_pipeline(options.out), options.grid or options.work
    for style in styles:
        prompts = [f"{name}, {style} style" for name in concepts]
        images = generate(pipeline, prompts, options.sampling_steps, options.guidance, options.seed)
        save_grid(images, options.columns, folder / f"sticker-{style}.webp")
        report("grid", out=str(folder / f"sticker-{style}.webp"), images=len(prompts))


def run_evaluate(options: argparse.Namespace) -> None:
    """Measure prediction error and retrieval, and draw what was measured."""
    rows, styles = data.load_rows(options.work), options.styles.split(",")
    chosen = data.select(rows, styles, data.read_concepts(options.concepts))
    candidates = data.select(rows, styles)
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
    """Trains the VAE's decoder."""
    task = DecoderTask(options.work, crop=options.crop, noise=options.latent_noise)
    if options.start:
        load_weights(options.start, task.model)
    return task


def text_task(options: argparse.Namespace) -> Task:
    """Pre-trains the text encoder."""
    return TextTask(options.work)


def denoiser_task(options: argparse.Namespace, finishing: bool = False) -> Task:
    """Trains the denoiser with its text encoders: on all chosen images, or `finishing`, on the list alone."""
    if (
        options.compile
        and options.mixed_precision == "bf16"
        and products("cpu") == AMX
        and not torch.cuda.is_available()
    ):
        raise UsageError("torch.compile gives wrong gradients in bf16 on a CPU with AMX; leave --compile out")
    captioned = Captioned.load(options.work)
    shape, process = captioned.shape, captioned.shape.process
    torch.manual_seed(0)
    denoiser = denoiser_of(options.work, shape)
    if options.start:
        load_weights(options.start, denoiser)
    elif finishing:
        load_average(options.work / "denoiser", denoiser, "denoiser")
    elif not options.fresh_text:
        pretrained = TextTask(options.work).model
        load_average(options.work / "text", pretrained, "text")
        (denoiser.states if isinstance(denoiser, FluxDenoiser) else denoiser.text).load_state_dict(
            pretrained.text.state_dict()
        )
        if shape.text_from is not None:
            load_text_encoder(options.work, shape.text_from, denoiser.text)
    if finishing:
        captioned = captioned.listed()
    objective = objective_from(options, process, uniform=0.4, t_mean=options.t_mean)
    routing = routing_from(options, process)
    if routing is not None and shape.transformer_blocks:
        routing = replace(routing, time="unit")  # Flux is told s, not 1000 s
    task = DenoisingTask(denoiser, captioned, objective, routing)
    if options.compile:
        denoiser.core.compile_repeated_blocks(dynamic=False)  # texts of two lengths: a graph each
    return task


def finish_task(options: argparse.Namespace) -> Task:
    """Goes on from the averaged weights of the denoiser's stage."""
    return denoiser_task(options, finishing=True)


TASKS = {"decoder": decoder_task, "text": text_task, "denoiser": denoiser_task, "finish": finish_task}


ALONE: dict[str, Stage] = {
    "cache": run_cache,
    "tokenizer": run_tokenizer,
    "latents": run_latents,
    "export": run_export,
    "grid": run_grid,
    "evaluate": run_evaluate,
}
LEFT = {"cache": "shape.json", "tokenizer": "tokens.safetensors", "latents": "latents.safetensors"}  # last file of each


def run(options: argparse.Namespace) -> None:
    """Run one stage, or all in order; of several processes the first does what is not training."""
    if options.threads:
        torch.set_num_threads(options.threads)
    names = ORDER if options.stage == "all" else (options.stage,)
    accelerator = None
    if any(name in TUNED for name in names):
        accelerator = make_accelerator(options)
    for name in names:
        if name in TUNED:
            assert accelerator is not None
            shape = Shape.of_work(options.work)
            tuned = TUNED[name] | shape.training.get(name, {})
            train_stage(name, options.work / name, TASKS[name], tuned, options, accelerator)
        elif accelerator is None or accelerator.is_main_process:
            kept = options.stage == "all" and options.resume and name in LEFT and (options.work / LEFT[name]).exists()
            if not kept:
                ALONE[name](options)
        if accelerator is not None:
            accelerator.wait_for_everyone()
    if accelerator is not None:
        accelerator.end_training()
