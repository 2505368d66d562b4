#!/usr/bin/env python3
"""Controlled experiments: what each training accelerator does at a small scale, everything else being equal.

    python scripts/compare_training.py run --data data/stickers --work runs/compare --model unet
    python scripts/compare_training.py run --data data/stickers --work runs/compare --model dit
    python scripts/compare_training.py table --work runs/compare

Every arm trains the same model from the same weights (per seed) with the same images, steps and learning rate, in the
latents of the embedded model's VAE. `unet` is text-conditional with the embedded model's frozen text encoder, `dit` is
conditional on the concept. Runs that are done are not repeated. `table` measures the samples and prints Markdown.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

from training_options import guarded, number

from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.training.files import read_json, write_json

CONCEPTS = Path(__file__).parent / "data" / "sticker_concepts_105.txt"
STYLES = ("noto", "flat", "3d", "twemoji")
ROUTING = {"task_routing": ""}
CLUSTERS = {"task_clusters": 5, "clustering": "snr"}
ARMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "routing": ROUTING,
    "routing, random": {"task_routing": "kind=random"},
    "immiscible knn:4": {"immiscible": "knn:4"},
    "immiscible assign": {"immiscible": "assign"},
    "min-snr 5": {"min_snr": 5.0},
    "clusters": CLUSTERS,
    "clusters, uw": CLUSTERS | {"task_loss": "uw"},
    "clusters, pcgrad": CLUSTERS | {"task_loss": "pcgrad"},
    "clusters, nash": CLUSTERS | {"task_loss": "nash"},
    "together": ROUTING | CLUSTERS | {"task_loss": "uw", "immiscible": "knn:4"},
}
COLOURS = {
    "baseline": "black",
    "min-snr 5": "gray",
    "together": "tab:red",
    "immiscible knn:4": "tab:cyan",
    "clusters, nash": "tab:olive",
}
UNET = {"block_out_channels": [32, 64, 96], "norm_num_groups": 16}
DIT = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32}
SETTINGS = {"batch": 60, "lr": 1e-3, "warmup": 50, "cooldown": 0.3, "ema": 0.99, "log_every": 25, "grid_every": 0}


def prepare(options: argparse.Namespace) -> Any:
    """The images as latents with their captions and concepts."""
    import torch
    from safetensors.torch import load_file, save_file
    from sticker import data as sticker_data

    from diffusion_accel.training import archives, datasets, models

    work, path = options.work / "data", options.base
    if not (work / "latents.safetensors").exists():
        size = 96
        sticker_data.cache_images(options.data, work, size)
        rows, images = sticker_data.load_rows(work), sticker_data.load_images(work)
        chosen = sticker_data.select(rows, STYLES, sticker_data.read_concepts(options.concepts))
        vae, composites = models.load_vae(path), archives.on_colours(images[chosen])
        with torch.no_grad():
            parts = [vae.encode(part).latent_dist.mean for part in composites.split(32)]
        save_file({"latents": torch.cat(parts), "indices": torch.from_numpy(chosen)}, work / "latents.safetensors")
    stored, rows = load_file(work / "latents.safetensors"), sticker_data.load_rows(work)
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


def run(options: argparse.Namespace) -> None:
    if options.command != "run":
        measure(options)
        print(table(options.work))
        if options.plot:
            plot(options.work, options.plot)
        return
    import torch
    from accelerate import Accelerator

    if options.threads:
        torch.set_num_threads(options.threads)
    examples, text = prepare(options)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    for seed in range(options.seeds) if options.only_seed is None else (options.only_seed,):
        for arm in ARMS:
            folder = options.work / options.model / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
            if not (folder / "result.json").exists() and (not options.arms or arm in options.arms):
                print(
                    json.dumps(
                        {"arm": arm, "seed": seed} | one(options, examples, text, arm, seed, folder, accelerator)
                    )
                )


def one(
    options: argparse.Namespace, examples: Any, text: Any, arm: str, seed: int, folder: Path, accelerator: Any
) -> dict[str, Any]:
    """Train one arm with one seed; its samples stay in the folder as latents."""
    import copy

    import numpy as np
    import torch
    from safetensors.torch import save_file
    from training_options import add_objective_options, exit_if_stopped, routing_from
    from training_setup import objective_from

    from diffusion_accel.training import models
    from diffusion_accel.training.denoising import Process
    from diffusion_accel.training.diffusion_task import Denoiser, DenoisingTask, prediction_error, sample_of
    from diffusion_accel.training.loop import Settings, train
    from diffusion_accel.training.sampling import sample
    from diffusion_accel.training.state import load_average

    parser = argparse.ArgumentParser()
    add_objective_options(parser)
    switches = argparse.Namespace(**vars(parser.parse_args([])) | ARMS[arm])
    torch.manual_seed(seed)
    clean = examples.clean(torch.tensor([0]))
    kind = "unet-text" if options.model == "unet" else "dit"
    config = models.default_config(kind, clean.shape[-1], clean.shape[1], 0, text.config.hidden_size if text else 0)
    model = models.build_denoiser(kind, config | (UNET if options.model == "unet" else DIT))
    denoiser = Denoiser(model, copy.deepcopy(text))
    process = Process()
    task = DenoisingTask(denoiser, examples, objective_from(switches, process), routing_from(switches, process))

    def evaluate() -> dict[str, Any]:
        """The same images, timesteps and noise in every arm; each held-out image four times."""
        result = {}
        for name, indices in (
            ("train", sample_of(examples.train, 120, seed=3)),
            ("heldout", np.tile(examples.heldout, 4)),
        ):
            index, zeros = torch.from_numpy(indices), torch.zeros(len(indices), dtype=torch.int64)
            condition = examples.condition(index, zeros, zeros.bool())
            result[f"error_{name}"] = prediction_error(denoiser, examples.clean(index), condition, process, bins=5)
        return result

    task.evaluate = evaluate  # type: ignore[method-assign]
    settings = Settings(**SETTINGS, seed=seed, steps=options.steps, eval_every=max(1, options.steps // 3))
    began = time.process_time()
    exit_if_stopped(train(task, folder, settings, accelerator, resume=(folder / "state.json").exists()), accelerator)
    seconds = time.process_time() - began
    load_average(folder, denoiser, "train")
    denoiser.eval()
    asked = torch.from_numpy(np.concatenate([sample_of(examples.train, 200, seed=5), examples.heldout]))
    zeros = torch.zeros(len(asked), dtype=torch.int64)
    condition, empty = examples.condition(asked, zeros, zeros.bool()), task.empty(len(asked))
    shape = (len(asked), *clean.shape[1:])
    with accelerator.autocast():
        made = sample(denoiser, process, shape, condition, empty, guidance=2.0, steps=10)
    save_file({"latents": made.half(), "asked": asked}, folder / "samples.safetensors")
    for state in folder.glob("state*"):
        state.unlink()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    curve = {line["step"]: line["error_heldout"]["mean"] for line in lines if "error_heldout" in line}
    last = lines[-1]
    result = {"curve": curve, "heldout": last["error_heldout"], "train": last["error_train"], "cpu_seconds": seconds}
    write_json(folder / "result.json", result)
    return {"heldout": last["error_heldout"]["mean"], "train": last["error_train"]["mean"], "cpu_seconds": seconds}


@functools.cache
def real_features() -> tuple[Any, dict[tuple[str, str], int]]:
    """Features of the real stickers, and where the one of a concept and style is."""
    from diffusion_accel.evaluation.prompts import embedded_reference

    _, real = embedded_reference()
    return real, {pair: i for i, pair in enumerate(zip(real.concepts, real.styles, strict=True))}


def measure(options: argparse.Namespace) -> None:
    """Add the distances of every run's samples to its result."""
    import torch
    from safetensors.torch import load_file
    from sticker import data as sticker_data

    from diffusion_accel.evaluation.classifier import extract, load_classifier
    from diffusion_accel.evaluation.distribution import frechet_distance, retrieval
    from diffusion_accel.training import models

    work, path = options.work / "data", options.base
    vae, classifier = models.load_vae(path), load_classifier()
    rows = sticker_data.load_rows(work)
    rows = [rows[i] for i in load_file(work / "latents.safetensors")["indices"].tolist()]
    for file in sorted(options.work.glob("*/*/result.json")):
        result = read_json(file)
        if "frechet" in result:
            continue
        stored = load_file(file.parent / "samples.safetensors")
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


def results(work: Path, model: str) -> dict[str, list[Any]]:
    """The results of every arm, in the order of the seeds."""
    found = {}
    for arm in ARMS:
        files = sorted((work / model).glob(f"{arm.replace(', ', '-').replace(' ', '-')}-[0-9]/result.json"))
        if files:
            found[arm] = [run for run in map(read_json, files) if "frechet" in run]
    return found


def table(work: Path) -> str:
    """Mean and standard deviation over the seeds, an arm a row; the difference is paired, seed by seed."""
    import numpy as np

    def spread(values: list[float], digits: int) -> str:
        return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.{digits}f}"

    lines = []
    for model in ("unet", "dit"):
        rows = results(work, model)
        if not rows:
            continue
        head = ["arm", "seeds", "loss, trained", "loss, held out", "paired difference, held out", "Fréchet"]
        lines += [f"### {model}", "", f"| {' | '.join([*head, 'right concept', 'CPU time'])} |", "|" + " --- |" * 8]
        base = rows["baseline"]
        for arm, runs in rows.items():
            change = [a["heldout"]["mean"] - b["heldout"]["mean"] for a, b in zip(runs, base, strict=False)]
            cost = np.mean([run["cpu_seconds"] for run in runs]) / np.mean([run["cpu_seconds"] for run in base])
            cells = [arm, str(len(runs)), spread([run["train"]["mean"] for run in runs], 4)]
            cells += [spread([run["heldout"]["mean"] for run in runs], 4)]
            cells += [f"{np.mean(change):+.4f} ({min(change):+.4f} … {max(change):+.4f})"]
            cells += [spread([run["frechet"] for run in runs], 0), f"{np.mean([run['concept'] for run in runs]):.0%}"]
            lines.append(f"| {' | '.join(cells)} | {cost:.2f} |")
        lines.append("")
    return "\n".join(lines)


def plot(work: Path, out: Path) -> None:
    """Held-out loss over the steps, mean and range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, model in zip(axes, ("unet", "dit"), strict=True):
        for arm, runs in results(work, model).items():
            steps = sorted(map(int, runs[0]["curve"]))
            curves = np.array([[run["curve"][str(step)] for step in steps] for run in runs])
            look = {"color": COLOURS[arm]} if arm in COLOURS else {}
            axis.plot(steps, curves.mean(0), marker="o", markersize=3, label=arm, **look)
            axis.fill_between(steps, curves.min(0), curves.max(0), alpha=0.15, **look)
        axis.set_title({"unet": "U-Net, text-conditional", "dit": "DiT, conditional on the concept"}[model])
        axis.set_xlabel("steps of 60 samples")
        axis.legend(fontsize=7)
    axes[0].set_ylabel("prediction error, held-out images")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data", type=Path, default=Path("data/stickers"), help="sticker data set")
    parser.add_argument("--work", type=Path, default=Path("runs/compare"), help="work folder (default: %(default)s)")
    parser.add_argument("--concepts", type=Path, default=CONCEPTS, help="file with the concepts")
    parser.add_argument("--model", choices=("unet", "dit"), default="unet")
    parser.add_argument("--base", type=Path, default=EMBEDDED["sticker"].path, help="pipeline of VAE and text encoder")
    parser.add_argument("--only-seed", type=number(0), help="run this seed only")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="table: also plot the losses (needs matplotlib)")
    parser.add_argument("--seeds", type=number(1), default=3)
    parser.add_argument("--steps", type=number(1), default=300, help="of 60 samples (default: 300)")
    parser.add_argument("--arms", nargs="*", help="only these arms")
    parser.add_argument("--threads", type=number(1))
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    return guarded(run, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
