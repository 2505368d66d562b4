#!/usr/bin/env python3
"""Train a diffusion model on a folder of images, and write it as a diffusers pipeline.

    python scripts/train_diffusion.py --data photos/ --model unet --size 32 --work runs/photos
    python scripts/train_diffusion.py --data classes/ --model dit --size 96 --vae sticker --task-routing
    python scripts/train_diffusion.py --data captioned/ --model unet-text --size 96 --vae sticker --immiscible knn:4

The data folder holds images, a folder of images for each class, or captions.jsonl (file and caption in each line).
Models: UNet2DModel (unet), UNet2DConditionModel (unet-text) and DiTTransformer2DModel (dit), in pixels or, with --vae,
in latents. Predictions: epsilon, v_prediction, flow. The training accelerators combine freely.

Several processes: torchrun --nproc-per-node 2 scripts/train_diffusion.py ... or accelerate launch. Ctrl-C saves the
state; the same command with --resume goes on exactly where it stopped.

Exit codes: 0 done, 1 failed, 2 wrong arguments, 130 or 143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from diffusion_accel.io import first_line
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
from diffusion_accel.training.files import TrainingError, UsageError, read_json, write_json

TUNED: dict[str, Any] = {"steps": 5000, "batch": 32, "lr": 1e-3, "warmup": 150}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--kind", choices=("folder", "classes", "captions"), help="what it holds (default: look)")
    parser.add_argument("--work", type=Path, default=Path("runs/diffusion"), help="work folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="pipeline folder to write (default: WORK/pipeline)")
    parser.add_argument("--model", choices=("unet", "unet-text", "dit"), required=True)
    parser.add_argument("--model-config", type=Path, help="JSON file with settings of the diffusers model to change")
    parser.add_argument("--size", type=number(8), default=64, help="image side in pixels (default: %(default)s)")
    parser.add_argument("--vae", type=Path, help="train in the latents of this VAE: a folder, or sticker")
    parser.add_argument("--text", type=Path, help="pipeline folder, or sticker, to take the text encoder from")
    parser.add_argument("--freeze-text", action="store_true", help="leave the text encoder as it is")
    parser.add_argument("--init", type=Path, help="start from the weights of this folder (unet or transformer)")
    parser.add_argument(
        "--heldout", type=number(0, float), default=0.05, help="share kept for evaluation (default: 0.05)"
    )
    parser.add_argument("--fp32", action="store_true", help="write float32 weights instead of float16")
    parser.add_argument("--overwrite", action="store_true", help="start again, replacing what is there")
    parser.add_argument("--seed", type=number(0), default=0, help="seed (default: 0)")
    parser.add_argument("--threads", type=number(1), help="CPU threads per process (default: torch's choice)")
    loop = parser.add_argument_group("training")
    loop.add_argument("--steps", type=number(1), help=f"budget in steps (default: {TUNED['steps']})")
    add_rate_options(loop, TUNED)
    add_loop_options(loop)
    group = parser.add_argument_group("objective")
    group.add_argument("--prediction", choices=("epsilon", "v_prediction", "flow"), default="v_prediction")
    text = "betas of the noise schedule (default: linear)"
    group.add_argument("--schedule", choices=("linear", "scaled_linear", "cosine"), default="linear", help=text)
    text = "share of empty conditions, for guidance (default: 0.1)"
    group.add_argument("--dropout", type=number(0, float), default=0.1, help=text)
    group.add_argument("--uniform", type=number(0, float), default=1.0, help="share of uniform timesteps (default: 1)")
    text = "centre of the other timesteps, which are logit-normal (default: 0)"
    group.add_argument("--t-mean", type=float, default=0.0, help=text)
    add_objective_options(group)
    text = "measure the task affinities of the trained weights, write them and exit"
    group.add_argument("--measure-affinity", type=Path, metavar="FILE", help=text)
    return parser


def check_clusters(count: int, settings: Any, processes: int) -> None:
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
    from diffusion_accel.model_files.names import EMBEDDED

    return EMBEDDED[str(path)].path if str(path) in EMBEDDED and not path.exists() else path


def run(options: argparse.Namespace) -> None:
    import torch

    from diffusion_accel.training import datasets, models
    from diffusion_accel.training.clusters import measure_affinity
    from diffusion_accel.training.denoising import Process
    from diffusion_accel.training.diffusion_task import Denoiser, DenoisingTask
    from diffusion_accel.training.loop import train
    from diffusion_accel.training.state import load_average

    if options.threads:
        torch.set_num_threads(options.threads)
    work, out = options.work, options.out or options.work / "pipeline"
    process = Process(options.prediction, options.schedule)
    accelerator = make_accelerator(options)
    main = accelerator.is_main_process
    if options.task_clusters is not None:
        check_clusters(options.task_clusters, settings_from(TUNED, options, options.steps), accelerator.num_processes)
    if main and options.overwrite and not options.resume:
        shutil.rmtree(work, ignore_errors=True)
    vae = None if options.vae is None else models.load_vae(folder_of(options.vae)).requires_grad_(False).eval()
    wanted = {"data": str(options.data.resolve()), "size": options.size, "vae": str(options.vae)}
    ready = (work / "prepared.json").exists()
    if ready and {**prepared(work), "kind": 0} != {**wanted, "kind": 0}:
        raise UsageError(f"{work} was prepared from other data, size or VAE; pass --overwrite or another --work")
    if main and not ready:
        kind = datasets.prepare(options.data, work, options.size, options.kind, options.heldout)
        if vae is not None:
            datasets.encode(work, vae, accelerator.device)
        write_json(work / "prepared.json", wanted | {"kind": kind})
    accelerator.wait_for_everyone()
    kind = prepared(work)["kind"]
    if (kind == "captions") != (options.model == "unet-text"):
        raise UsageError(f"--model {options.model} does not go with data of the kind {kind!r}; see --help")

    torch.manual_seed(options.seed)
    text = tokenizer = None
    if kind == "captions":
        text, tokenizer = text_parts(options, work)
        text.requires_grad_(not options.freeze_text)
    examples = datasets.load_examples(work, vae, tokenizer)
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
    config |= changes
    model = models.build_denoiser(options.model, config)
    if options.init is not None:
        load_initial(model, folder_of(options.init))
    fixed = {"dropout": options.dropout, "uniform": options.uniform, "t_mean": options.t_mean}
    objective = objective_from(options, process, scalable=vae is not None, **fixed)
    denoiser = Denoiser(model, text)
    task = DenoisingTask(denoiser, examples, objective, routing_from(options, process))

    folder, settings = work / "train", settings_from(TUNED, options, options.steps)
    if options.measure_affinity is not None:
        load_average(folder, denoiser, "train")
        write_json(options.measure_affinity, {"affinity": measure_affinity(task)})
        return
    if main:
        print(datasets.describe(examples.rows), flush=True)
    outcome = train(task, folder, settings, accelerator, resume=options.resume)
    exit_if_stopped(outcome, accelerator)
    if main and outcome.finished:
        load_average(folder, denoiser, "train")
        core = denoiser.core.to(memory_format=torch.contiguous_format)
        if vae is not None and objective.noise.scale != 1:  # what is drawn is divided by it before it is decoded
            vae.register_to_config(scaling_factor=vae.config.scaling_factor * objective.noise.scale)
        made = models.save_trained(out, core, process, vae, text, tokenizer, classes, not options.fp32)
        report("train", step=outcome.step, finished=True, processes=accelerator.num_processes, out=str(out), saved=made)
    elif main:
        report("train", step=outcome.step, finished=False, processes=accelerator.num_processes)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def prepared(work: Path) -> dict[str, Any]:
    """What a work folder was prepared from."""
    found = read_json(work / "prepared.json")
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        raise TrainingError(f"{work / 'prepared.json'} is damaged; pass --overwrite to prepare the folder again")
    return found


def text_parts(options: argparse.Namespace, work: Path) -> tuple[Any, Any]:
    """The text encoder and tokenizer of --text, or new ones for the captions of the data."""
    from sticker.data import train_tokenizer
    from sticker.models import Shape, build_text_encoder

    from diffusion_accel.training import models
    from diffusion_accel.training.files import read_json_lines

    if options.text is not None:
        return models.load_text(folder_of(options.text))
    tokenizer = train_tokenizer([row["caption"] for row in read_json_lines(work / "rows.jsonl")], 2048, 24)
    return build_text_encoder(Shape(), tokenizer), tokenizer


def load_initial(model: Any, path: Path) -> None:
    """Weights of the same kind of model, from its own folder or a pipeline folder."""
    part = "unet" if "UNet" in type(model).__name__ else "transformer"
    from diffusion_accel.training.files import load_tensors

    file = (path / part if (path / part).is_dir() else path) / "diffusion_pytorch_model.safetensors"
    try:
        model.load_state_dict(load_tensors(file))
    except (TrainingError, RuntimeError) as error:
        raise UsageError(f"--init: {file} does not fit this model: {first_line(error)}") from error


def main(arguments: list[str] | None = None) -> int:
    return guarded(run, make_parser().parse_args(arguments))


if __name__ == "__main__":
    program(main)
