#!/usr/bin/env python
"""Schedules of QuEST's second stage against each other, on the embedded model and with equal CPU time.

    python scripts/measure_finetuning.py --bits w4a8 --seconds 240 --json runs/finetuning-w4a8.json

One quantized model, up to the grids of its inputs, is the beginning of all; then each schedule finetunes it for as many
seconds of CPU time, whatever else the machine does. What counts is the error of predictions on prompts that nothing was
calibrated on, relative to the squared answers of full precision. Schedules that the JSON file has are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffusion_accel.denoisers import TIME_LAYERS
from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.io import replacing
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.quant.ptq.calibration import relative_error
from diffusion_accel.quant.ptq.finetune import FINETUNING, FinetuneSettings, chosen_layers, matching
from diffusion_accel.quant.ptq.finetuner import Finetuner, batches
from diffusion_accel.quant.ptq.reconstruct import RoundingSettings
from diffusion_accel.quant.ptq.run import STAGES, QuantizationRun
from diffusion_accel.quant.ptq.settings import QuantizeSettings, parse_bits
from diffusion_accel.quant.ptq.stage import RunState
from diffusion_accel.quant.ptq.trainable_layer import set_quantization_state

SETTINGS = EMBEDDED["sticker"].settings
ROWS = 16  # of each timestep, for the error


def compare(state: RunState, schedules: list[FinetuneSettings], budget: float, file: Path) -> None:
    """Finetune by each schedule from the same beginning, and write down what comes out.

    Args:
        state: a run that has the grids of its inputs.
        budget: seconds of CPU time of each schedule.
        file: JSON, whose schedules are not run again.
    """
    found = json.loads(file.read_text()) if file.is_file() else {}
    begin = {
        n: {k: v.detach().clone() for k, v in layer.named_parameters(recurse=False)}
        for n, layer in state.trainable.items()
    }
    before = error(state)
    for f in schedules:
        name = f"batch {f.batch}, moments {f.moments}, rate {f.rate:g}"
        if name in found:
            continue
        for key, values in begin.items():
            state.trainable[key].own()
            for what, value in values.items():
                getattr(state.trainable[key], what).data.copy_(value)
        found[name] = {"before": before, **learn(state, f, budget)}
        print(name, json.dumps(found[name]), flush=True)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")


def learn(state: RunState, f: FinetuneSettings, budget: float) -> dict[str, Any]:
    """Stage 2 for as long as there is time, its rate falling along a cosine."""
    count = len(state.calibration.timesteps)
    others = [n for n in state.trainable if n not in matching(state.trainable, (TIME_LAYERS,))]
    finetuner = Finetuner(
        state.denoiser, state.trainable, chosen_layers(state), others, f.rate, f.scale_rate, f.layer_loss, f.moments
    )
    used, place, steps, errors = 0.0, 0, 0, []
    while used < budget:
        epoch, turn = divmod(place, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch)).tolist()
        finetuner.visit(order[turn])
        finetuner.pace(0.5 * (1 + math.cos(math.pi * used / budget)))
        began = time.process_time()
        for rows in batches(state.calibration, order[turn], f.rows, f.batch, place):
            finetuner.step(rows)
            steps += 1
        used, place = used + time.process_time() - began, place + 1
        if used >= budget * (len(errors) + 1) / 4:
            errors.append(error(state))
    finetuner.close()
    return {"error": errors[-1], "quarters": errors, "steps": steps, "epochs": place / count, "seconds": used}


def error(state: RunState) -> float:
    """Of predictions on the validation rows."""
    set_quantization_state(state.trainable, weights=True, inputs=True)
    buckets = range(len(state.heldout.timesteps))
    return relative_error(state.denoiser, (state.heldout.sample(b, ROWS, 0) for b in buckets))


def main() -> None:
    """Quantize up to the ranges, then compare the schedules."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--seconds", type=float, default=240.0, help="CPU time of each schedule")
    parser.add_argument("--count", type=int, default=256, help="prompts of the calibration set")
    parser.add_argument("--iterations", type=int, default=200, help="of learning the rounding of each block")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 5e-5])
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 4])
    parser.add_argument("--moments", nargs="+", default=["shared", "timestep", "visit"])
    parser.add_argument("--work", type=Path, help="folder of the stages before; runs/finetuning-BITS by default")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load_pipeline("sticker")
    set_scheduler(pipe, SETTINGS["scheduler"])
    pipe.set_progress_bar_config(disable=True)
    weights, inputs = parse_bits(options.bits)
    plain = FinetuneSettings(layer_loss=False, time_epochs=(0, 0, 0))
    settings = QuantizeSettings(
        weight_bits=weights,
        activation_bits=inputs,
        rounding=RoundingSettings(iterations=options.iterations) if options.iterations else None,
        finetune=plain,
    )
    given = {k: SETTINGS[k] for k in ("guidance_scale", "height", "width")}
    sampler = Sampler(pipe, tuple(embedded_prompts(options.count)), SETTINGS["steps"], 0, 8, given)
    work = options.work or Path("runs") / f"finetuning-{options.bits}"
    schedules = [
        replace(plain, batch=batch, moments=moments, rate=rate)
        for rate in options.rates
        for batch in options.batches
        for moments in options.moments
    ]
    before = STAGES[: STAGES.index(FINETUNING)]
    run = QuantizationRun(sampler, settings, work, stages=before)
    run.run()
    compare(run, schedules, options.seconds, options.json)


if __name__ == "__main__":
    main()
