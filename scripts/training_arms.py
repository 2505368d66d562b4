"""Training and measuring the arms that `compare_training.py` compares."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from sticker import data
from training_options import add_objective_options, exit_if_stopped, routing_from
from training_setup import objective_from

from diffusion_accel.evaluation.classifier import extract, load_classifier
from diffusion_accel.evaluation.distribution import frechet_distance, retrieval
from diffusion_accel.evaluation.prompts import embedded_reference
from diffusion_accel.training import archives, datasets, models
from diffusion_accel.training.arrays import load_tensors
from diffusion_accel.training.denoising import Process
from diffusion_accel.training.diffusion_task import Denoiser, DenoisingTask, prediction_error, sample_of
from diffusion_accel.training.files import read_json, write_json
from diffusion_accel.training.loop import Settings, train
from diffusion_accel.training.sampling import sample
from diffusion_accel.training.state import STATE, load_average

STYLES = ("noto", "flat", "3d", "twemoji")
UNET = {"block_out_channels": [32, 64, 96], "norm_num_groups": 16}
DIT = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32}
SETTINGS = {"batch": 60, "lr": 1e-3, "warmup": 50, "cooldown": 0.3, "ema": 0.99, "log_every": 25, "grid_every": 0}


def prepare(options: argparse.Namespace) -> Any:
    """The images as latents with their captions and concepts."""
    work, path = options.work / "data", options.base
    if not (work / "latents.safetensors").exists():
        size = 96
        data.cache_images(options.data, work, size)
        rows, images = data.load_rows(work), data.load_images(work)
        chosen = data.select(rows, STYLES, data.read_concepts(options.concepts))
        vae, composites = models.load_vae(path), archives.on_colours(images[chosen])
        with torch.no_grad():
            parts = [vae.encode(part).latent_dist.mean for part in composites.split(32)]
        save_file({"latents": torch.cat(parts), "indices": torch.from_numpy(chosen)}, work / "latents.safetensors")
    stored, rows = load_tensors(work / "latents.safetensors", "latents", "indices"), data.load_rows(work)
    rows = [rows[i] for i in stored["indices"].tolist()]
    if options.model == "unet":
        encoder, tokenizer = models.load_text(path)
        padding = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        captions = [archives.caption_of(row) for row in rows]
        conditions = torch.tensor(tokenizer(captions, **padding).input_ids)
        empty = torch.tensor(tokenizer([""], **padding).input_ids[0])
        return datasets.ImageExamples(rows, stored["latents"], conditions, empty), encoder.requires_grad_(False)
    concepts = sorted({row["slug"] for row in rows})
    conditions = torch.tensor([concepts.index(row["slug"]) for row in rows])
    return datasets.ImageExamples(rows, stored["latents"], conditions, torch.tensor(models.DIT_EMPTY)), None


class ArmTask(DenoisingTask):
    """The task of an arm; evaluated on the same images, timesteps and noise in all."""

    def evaluate(self) -> dict[str, Any]:
        """`prediction_error` of 120 trained images, and of each held-out one four times."""
        result, examples = {}, self.examples
        for name, indices in (
            ("train", sample_of(examples.train, 120, seed=3)),
            ("heldout", np.tile(examples.heldout, 4)),
        ):
            index, zeros = torch.from_numpy(indices), torch.zeros(len(indices), dtype=torch.int64)
            condition = examples.condition(index, zeros, zeros.bool())
            clean, process = examples.clean(index), self.objective.process
            result[f"error_{name}"] = prediction_error(self.model, clean, condition, process, bins=5)
        return result


def arm_task(model: str, examples: datasets.ImageExamples, text: Any, arm: dict[str, Any], seed: int) -> ArmTask:
    """The model of an arm, from the same weights in all arms of a seed, with the arm's switches."""
    parser = argparse.ArgumentParser()
    add_objective_options(parser)
    switches = argparse.Namespace(**vars(parser.parse_args([])) | arm)
    torch.manual_seed(seed)
    clean = examples.clean(torch.tensor([0]))
    kind = "unet-text" if model == "unet" else "dit"
    config = models.default_config(kind, clean.shape[-1], clean.shape[1], 0, text.config.hidden_size if text else 0)
    denoiser = models.build_denoiser(kind, config | (UNET if model == "unet" else DIT))
    process = Process()
    objective = objective_from(switches, process)
    return ArmTask(Denoiser(denoiser, copy.deepcopy(text)), examples, objective, routing_from(switches, process))


def train_arm(
    options: argparse.Namespace,
    examples: datasets.ImageExamples,
    text: Any,
    arm: dict[str, Any],
    seed: int,
    folder: Path,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Train one arm with one seed; its samples stay in the folder as latents."""
    task = arm_task(options.model, examples, text, arm, seed)
    settings = Settings(**SETTINGS, seed=seed, steps=options.steps, eval_every=max(1, options.steps // 3))
    began = time.process_time()
    exit_if_stopped(train(task, folder, settings, accelerator, resume=(folder / STATE).exists()), accelerator)
    seconds = time.process_time() - began
    load_average(folder, task.model, "train")
    task.model.eval()
    asked = torch.from_numpy(np.concatenate([sample_of(examples.train, 200, seed=5), examples.heldout]))
    zeros = torch.zeros(len(asked), dtype=torch.int64)
    condition, empty = examples.condition(asked, zeros, zeros.bool()), task.empty(len(asked))
    shape = (len(asked), *examples.clean(torch.tensor([0])).shape[1:])
    with accelerator.autocast():
        made = sample(task.model, task.objective.process, shape, condition, empty, guidance=2.0, steps=10)
    save_file({"latents": made.half(), "asked": asked}, folder / "samples.safetensors")
    for state in folder.glob("state*"):
        state.unlink()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    curve = {line["step"]: line["error_heldout"]["mean"] for line in lines if "error_heldout" in line}
    last = lines[-1]
    result = {"curve": curve, "heldout": last["error_heldout"], "train": last["error_train"], "cpu_seconds": seconds}
    write_json(folder / "result.json", result)
    return {"heldout": last["error_heldout"]["mean"], "train": last["error_train"]["mean"], "cpu_seconds": seconds}


def run(options: argparse.Namespace, arms: dict[str, dict[str, Any]]) -> None:
    """Train what is not there yet: of every seed each arm that was asked for."""
    if options.threads:
        torch.set_num_threads(options.threads)
    examples, text = prepare(options)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    for seed in range(options.seeds) if options.only_seed is None else (options.only_seed,):
        for name, arm in arms.items():
            folder = options.work / options.model / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            if not (folder / "result.json").exists() and (not options.arms or name in options.arms):
                result = train_arm(options, examples, text, arm, seed, folder, accelerator)
                print(json.dumps({"arm": name, "seed": seed} | result))


@functools.cache
def real_features() -> tuple[Any, dict[tuple[str, str], int]]:
    """Features of the real stickers, and where the one of a concept and style is."""
    _, real = embedded_reference()
    return real, {pair: i for i, pair in enumerate(zip(real.concepts, real.styles, strict=True))}


def measure(options: argparse.Namespace) -> None:
    """Add the distances of every run's samples to its result."""
    work, path = options.work / "data", options.base
    vae, classifier = models.load_vae(path), load_classifier()
    rows = data.load_rows(work)
    rows = [rows[i] for i in load_tensors(work / "latents.safetensors", "latents", "indices")["indices"].tolist()]
    for file in sorted(options.work.glob("*/*/result.json")):
        result = read_json(file)
        if "frechet" in result:
            continue
        stored = load_tensors(file.parent / "samples.safetensors", "latents", "asked")
        with torch.no_grad():
            parts = [vae.decode(part).sample.clamp(-1, 1) for part in stored["latents"].float().split(32)]
        asked = [rows[i] for i in stored["asked"].tolist()]
        real, where = real_features()
        same = real.values[[where[row["slug"], row["style"]] for row in asked]]
        made = extract(classifier, torch.cat(parts))
        styles = [row["style"] if file.parent.parent.name == "unet" else "" for row in asked]
        concepts = [row["slug"] for row in asked]
        found = retrieval(made, concepts, styles, real.values, real.concepts, real.styles)
        result |= {"frechet": frechet_distance(same, made), "concept": found["any_top1"]}
        write_json(file, result)
