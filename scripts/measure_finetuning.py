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
from diffusion_accel.evaluation.quality import embedded_prompts
from diffusion_accel.io import replacing
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.quant.ptq.finetune import FinetuneSettings, Tuner, batches, matching, relative_error
from diffusion_accel.quant.ptq.reconstruct import RoundingSettings
from diffusion_accel.quant.ptq.run import Quantization
from diffusion_accel.quant.ptq.settings import QuantizeSettings, parse_bits
from diffusion_accel.quant.ptq.trainable_layer import rounding

SETTINGS = EMBEDDED["sticker"].settings
ROWS = 16  # of each timestep, for the error


class Measured(Quantization):
    """A run whose finetuning is that of several schedules, each from the same beginning."""

    schedules: list[FinetuneSettings]
    budget: float
    file: Path

    def _finetune(self) -> None:
        found = json.loads(self.file.read_text()) if self.file.is_file() else {}
        begin = {
            n: {k: v.detach().clone() for k, v in d.named_parameters(recurse=False)} for n, d in self.drafts.items()
        }
        before = self.error()
        for f in self.schedules:
            name = f"batch {f.batch}, moments {f.moments}, rate {f.rate:g}"
            if name in found:
                continue
            for key, values in begin.items():
                self.drafts[key].own()
                for what, value in values.items():
                    getattr(self.drafts[key], what).data.copy_(value)
            found[name] = {"before": before, **self.learn(f)}
            print(name, json.dumps(found[name]), flush=True)
            with replacing(self.file) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n")

    def learn(self, f: FinetuneSettings) -> dict[str, Any]:
        """Stage 2 for as long as there is time, its rate falling along a cosine."""
        count = len(self.calibration.timesteps)
        others = [n for n in self.drafts if n not in matching(self.drafts, (TIME_LAYERS,))]
        tuner = Tuner(
            self.denoiser, self.drafts, self.chosen_layers(), others, f.rate, f.scale_rate, f.layer_loss, f.moments
        )
        used, place, steps, errors = 0.0, 0, 0, []
        while used < self.budget:
            epoch, turn = divmod(place, count)
            order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch)).tolist()
            tuner.visit(order[turn])
            tuner.pace(0.5 * (1 + math.cos(math.pi * used / self.budget)))
            began = time.process_time()
            for rows in batches(self.calibration, order[turn], f.rows, f.batch, place):
                tuner.step(rows)
                steps += 1
            used, place = used + time.process_time() - began, place + 1
            if used >= self.budget * (len(errors) + 1) / 4:
                errors.append(self.error())
        tuner.close()
        return {"error": errors[-1], "quarters": errors, "steps": steps, "epochs": place / count, "seconds": used}

    def error(self) -> float:
        """Of predictions on the validation rows."""
        rounding(self.drafts, True, True)
        buckets = range(len(self.heldout.timesteps))
        return relative_error(self.denoiser, (self.heldout.sample(b, ROWS, 0) for b in buckets))


def main() -> None:
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
    run = Measured(sampler, settings, work, lambda what, share, left: None)
    run.budget, run.file = options.seconds, options.json
    run.schedules = [
        replace(plain, batch=batch, moments=moments, rate=rate)
        for rate in options.rates
        for batch in options.batches
        for moments in options.moments
    ]
    run.run(None)


if __name__ == "__main__":
    main()
