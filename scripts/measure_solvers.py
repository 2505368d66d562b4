#!/usr/bin/env python3
"""How near stock solvers come to the converged images: every spacing that diffusers offers, at equal evaluations.

The converged images are those of `bench`: many steps of DPM-Solver++. A row is a solver, a spacing and a number of
evaluations of the denoiser; a solver that needs two in a step (Heun) gets half the steps. What it really called is
counted. Progress goes to stderr, the table of the best of each number to stdout.

python scripts/measure_solvers.py --count 12 --json runs/solvers.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffusion_accel.bench.benchmark import UNSEEN
from diffusion_accel.bench.entries import Entry
from diffusion_accel.bench.run import CONVERGED_STEPS, converged_images
from diffusion_accel.bench.runner import Job, Runner
from diffusion_accel.denoisers import find_denoisers
from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.io import replacing
from diffusion_accel.measure.fidelity import psnr, spread
from diffusion_accel.model_files.names import find_model
from diffusion_accel.pipelines.schedulers import SCHEDULERS
from diffusion_accel.pipelines.spacings import TAKES

SOLVERS = ("ddim", "dpm++", "unipc", "deis", "euler", "heun")
COUNTS = (5, 6, 8, 10, 12, 15, 16, 20, 25)
TWICE = ("heun",)  # they call the denoiser twice in a step, once in the last one


def steps_for(solver: str, evaluations: int) -> int:
    """How many steps of a solver take at most so many evaluations, at least one."""
    return max(1, (evaluations + 1) // 2 if solver in TWICE else evaluations)


def jobs(solvers: tuple[str, ...], counts: tuple[int, ...]) -> Iterator[tuple[str, str, int]]:
    """Solver, spacing and number of evaluations of every row."""
    for count in counts:
        for solver in solvers:
            for spacing in TAKES[SCHEDULERS[solver][0]]:
                yield solver, spacing, count


@contextmanager
def counted(runner: Runner) -> Iterator[list[int]]:
    """Within this context, the number of calls of the denoisers, in a list of one."""
    calls = [0]

    def note(*_: Any) -> None:
        calls[0] += 1

    handles = [denoiser.register_forward_pre_hook(note) for denoiser in find_denoisers(runner.pipe)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def measured(runner: Runner, goal: torch.Tensor, solver: str, spacing: str, count: int) -> dict[str, Any]:
    """One row: what it called, and how near it came."""
    steps = steps_for(solver, count)
    row: dict[str, Any] = {"solver": solver, "spacing": spacing, "asked": count, "steps": steps}
    try:
        with counted(runner) as calls:
            images = runner.images(Entry("fewer-steps", f"{steps},{solver},{spacing}"))
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    row["evaluations"] = calls[0] / len(list(runner.sampler.chunks()))
    values = psnr(goal, images.nan_to_num())
    median, worst = spread(values)
    return row | {
        "median": round(median, 2),
        "worst_decile": round(worst, 2),
        "each": [round(min(float(v), 200.0), 2) for v in values],
    }


def best(rows: list[dict[str, Any]], key: str = "median") -> dict[int, dict[str, Any]]:
    """The best row of each number of evaluations, by the median or by the worst decile."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        if key in row and row[key] > found.get(row["asked"], {}).get(key, -math.inf):
            found[row["asked"]] = row
    return found


def runner_of(options: argparse.Namespace) -> Runner:
    """The model, with the prompts of the benchmark: those that no plan was tuned on."""
    source = find_model(options.model)
    known = source.defaults
    prompts = embedded_prompts(options.count, UNSEEN) if source.kind == "embedded" else [""] * options.count
    if options.prompts_file is not None:
        prompts = options.prompts_file.read_text(encoding="utf-8").splitlines()[: options.count]
    call = {name: known.get(name) for name in ("guidance_scale", "height", "width")}
    if options.guidance_scale is not None:
        call["guidance_scale"] = options.guidance_scale
    return Runner(
        Job(
            options.model,
            tuple(prompts),
            CONVERGED_STEPS,
            seed=options.seed,
            batch=options.batch,
            threads=options.threads,
            options=call,
        )
    )


def main() -> int:
    """Measure, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sticker", help="embedded name, folder or hub id")
    parser.add_argument("--prompts-file", type=Path, help="a prompt a line, for a model that is not embedded")
    parser.add_argument("--count", type=int, default=12, help="images")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=12, help="images in a call")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--solvers", nargs="+", default=SOLVERS, choices=SOLVERS)
    parser.add_argument("--evaluations", nargs="+", type=int, default=COUNTS)
    parser.add_argument("--json", type=Path, help="write every row, image by image")
    options = parser.parse_args()
    runner = runner_of(options)
    goal = converged_images(runner)
    if goal is None:
        raise SystemExit("there are no converged images: neither DPM-Solver++ nor the model's own scheduler works")
    rows: list[dict[str, Any]] = []
    for solver, spacing, count in jobs(tuple(options.solvers), tuple(options.evaluations)):
        row = measured(runner, goal, solver, spacing, count)
        rows.append(row)
        print(*(f"{key}={value}" for key, value in row.items() if key != "each"), file=sys.stderr, flush=True)
    if options.json is not None:
        head = {"model": options.model, "converged": f"{CONVERGED_STEPS} steps of dpm++", "prompts": runner.job.prompts}
        settings = {"seed": options.seed, "options": runner.job.options, "torch": torch.__version__}
        with replacing(options.json) as file:
            file.write_text(json.dumps(head | settings | {"rows": rows}, indent=1), encoding="utf-8")
    print("| evaluations | best by median | median dB | worst decile dB | best by worst decile | worst decile dB |")
    print("| --- | --- | --- | --- | --- | --- |")
    worst = best(rows, "worst_decile")
    for count, row in best(rows).items():
        other = worst[count]
        print(
            f"| {count} | {row['solver']},{row['spacing']} ({row['evaluations']:g}) | {row['median']:.1f} | "
            f"{row['worst_decile']:.1f} | {other['solver']},{other['spacing']} | {other['worst_decile']:.1f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
