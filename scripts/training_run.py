"""What `train_diffusion.py` does: prepares the data, builds model and task, trains, and writes the pipeline."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from sticker.data import train_tokenizer
from sticker.models import Shape, build_text_encoder
from training_options import exit_if_stopped, report, routing_from, settings_from
from training_setup import make_accelerator, objective_from

from diffusion_accel.io import first_line
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.training import datasets, models
from diffusion_accel.training.affinity import measure_affinity
from diffusion_accel.training.arrays import load_tensors
from diffusion_accel.training.denoising import Process
from diffusion_accel.training.diffusion_task import Denoiser, DenoisingTask
from diffusion_accel.training.files import TrainingError, UsageError, read_json, read_json_lines, write_json
from diffusion_accel.training.loop import train
from diffusion_accel.training.settings import Settings
from diffusion_accel.training.state import load_average


@dataclass
class Parts:
    """What is trained, and what it is saved with."""

    task: DenoisingTask
    denoiser: Denoiser
    examples: datasets.ImageExamples
    vae: Any
    text: Any
    tokenizer: Any
    classes: list[str]


def run(options: argparse.Namespace, tuned: dict[str, Any]) -> None:
    """Train as the options say; `tuned` are the settings that they change."""
    if options.threads:
        torch.set_num_threads(options.threads)
    process = Process(options.prediction, options.schedule)
    accelerator = make_accelerator(options)
    settings = settings_from(tuned, options, options.steps)
    if options.task_clusters is not None:
        check_clusters(options.task_clusters, settings, accelerator.num_processes)
    if accelerator.is_main_process and options.overwrite and not options.resume:
        shutil.rmtree(options.work, ignore_errors=True)
    vae = None if options.vae is None else models.load_vae(folder_of(options.vae)).requires_grad_(False).eval()
    kind = prepare(options, vae, accelerator)
    parts = build(options, kind, vae, process)
    folder = options.work / "train"
    if options.measure_affinity is not None:
        load_average(folder, parts.denoiser, "train")
        write_json(options.measure_affinity, {"affinity": measure_affinity(parts.task)})
        return
    if accelerator.is_main_process:
        print(datasets.describe(parts.examples.rows), flush=True)
    outcome = train(parts.task, folder, settings, accelerator, resume=options.resume)
    exit_if_stopped(outcome, accelerator)
    facts = {"step": outcome.step, "finished": outcome.finished, "processes": accelerator.num_processes}
    if accelerator.is_main_process and outcome.finished:
        load_average(folder, parts.denoiser, "train")
        out = options.out or options.work / "pipeline"
        report("train", **facts, out=str(out), saved=save(out, parts, process, half=not options.fp32))
    elif accelerator.is_main_process:
        report("train", **facts)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def check_clusters(count: int, settings: Settings, processes: int) -> None:
    """Refuse a batch whose micro-batches cannot be divided among the task clusters, before anything is encoded."""
    parts = processes * settings.accumulation
    micro = settings.batch // parts
    if settings.batch % parts == 0 and micro % count:
        near = max(1, round(micro / count)) * count * parts
        raise UsageError(
            f"--task-clusters {count}: the {micro} samples of a micro-batch cannot be divided among them; use --batch "
            f"{near}"
        )


def folder_of(path: Path) -> Path:
    """`path`, or the folder of the embedded model that it names."""
    return EMBEDDED[str(path)].path if str(path) in EMBEDDED and not path.exists() else path


def prepare(options: argparse.Namespace, vae: Any, accelerator: Accelerator) -> str:
    """Read the data into the work folder, unless that was done before; the kind of data."""
    work = options.work
    wanted = {"data": str(options.data.resolve()), "size": options.size, "vae": str(options.vae)}
    ready = (work / "prepared.json").exists()
    if ready and {**prepared(work), "kind": 0} != {**wanted, "kind": 0}:
        raise UsageError(f"{work} was prepared from other data, size or VAE; pass --overwrite or another --work")
    if accelerator.is_main_process and not ready:
        kind = datasets.prepare(options.data, work, options.size, options.kind, options.heldout)
        if vae is not None:
            datasets.encode(work, vae, accelerator.device)
        write_json(work / "prepared.json", wanted | {"kind": kind})
    accelerator.wait_for_everyone()
    kind = prepared(work)["kind"]
    if (kind == "captions") != (options.model == "unet-text"):
        raise UsageError(f"--model {options.model} does not go with data of the kind {kind!r}; see --help")
    return str(kind)


def build(options: argparse.Namespace, kind: str, vae: Any, process: Process) -> Parts:
    """Model, examples and task."""
    torch.manual_seed(options.seed)
    text = tokenizer = None
    if kind == "captions":
        text, tokenizer = text_parts(options, options.work)
        text.requires_grad_(not options.freeze_text)
    examples = datasets.load_examples(options.work, vae, tokenizer)
    classes = datasets.class_names(examples.rows) if kind == "classes" else []
    if options.model == "dit" and not classes:
        raise UsageError("--model dit needs classes: a data folder with a folder of images for each class")
    if options.model == "dit":
        examples.empty = torch.tensor(models.DIT_EMPTY)
    clean = examples.clean(torch.tensor([0]))
    width = text.config.hidden_size if text is not None else 0
    config = models.default_config(options.model, clean.shape[-1], clean.shape[1], len(classes), width)
    changes = read_json(options.model_config) if options.model_config else {}
    if not isinstance(changes, dict):
        raise UsageError(f"{options.model_config} must hold a JSON object of settings")
    model = models.build_denoiser(options.model, config | changes)
    if options.init is not None:
        load_initial(model, folder_of(options.init))
    fixed = {"dropout": options.dropout, "uniform": options.uniform, "t_mean": options.t_mean}
    objective = objective_from(options, process, scalable=vae is not None, **fixed)
    denoiser = Denoiser(model, text)
    task = DenoisingTask(denoiser, examples, objective, routing_from(options, process))
    return Parts(task, denoiser, examples, vae, text, tokenizer, classes)


def save(out: Path, parts: Parts, process: Process, half: bool) -> str:
    """Write the averaged weights, which the denoiser has, as a pipeline; what it is."""
    core = parts.denoiser.core.to(memory_format=torch.contiguous_format)
    vae, scale = parts.vae, parts.task.scale
    if vae is not None and scale != 1:  # what is drawn is divided by it before it is decoded
        vae.register_to_config(scaling_factor=vae.config.scaling_factor * scale)
    return models.save_trained(out, core, process, vae, parts.text, parts.tokenizer, parts.classes, half)


def prepared(work: Path) -> dict[str, Any]:
    """What a work folder was prepared from."""
    found = read_json(work / "prepared.json")
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        raise TrainingError(f"{work / 'prepared.json'} is damaged; pass --overwrite to prepare the folder again")
    return found


def text_parts(options: argparse.Namespace, work: Path) -> tuple[Any, Any]:
    """The text encoder and tokenizer of --text, or new ones for the captions of the data."""

    if options.text is not None:
        return models.load_text(folder_of(options.text))
    tokenizer = train_tokenizer([row["caption"] for row in read_json_lines(work / "rows.jsonl")], 2048, 24)
    return build_text_encoder(Shape(), tokenizer), tokenizer


def load_initial(model: Any, path: Path) -> None:
    """Weights of the same kind of model, from its own folder or a pipeline folder."""
    part = "unet" if "UNet" in type(model).__name__ else "transformer"
    file = (path / part if (path / part).is_dir() else path) / "diffusion_pytorch_model.safetensors"
    try:
        model.load_state_dict(load_tensors(file))
    except (TrainingError, RuntimeError) as error:
        raise UsageError(f"--init: {file} does not fit this model: {first_line(error)}") from error
