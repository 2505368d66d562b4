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
import sys
from pathlib import Path
from typing import Any

import numpy as np
from training_options import guarded, number

from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.training.files import read_json

CONCEPTS = Path(__file__).parent / "data" / "sticker_concepts_105.txt"
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


def run(options: argparse.Namespace) -> None:
    """Train the arms, or measure what they draw and print the table."""
    import training_arms  # heavy: torch

    if options.command == "run":
        training_arms.run(options, ARMS)
        return
    training_arms.measure(options)
    print(table(options.work))
    if options.plot:
        plot(options.work, options.plot)


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
    import matplotlib  # optional package

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # optional package

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
    """Train, or print the table; the exit code."""
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
