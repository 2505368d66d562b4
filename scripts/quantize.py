#!/usr/bin/env python
"""Quantize a model into a checkpoint that diffusers loads: the shortest program around `diffusion_accel.quantize`.

    python scripts/quantize.py --model sticker --bits w4a8 --minutes 30 -o sticker-w4a8
    python scripts/quantize.py --model some/model-id --prompts prompts.txt --bits w4a8 -o model-w4a8

`diffusion-accel quantize` does the same and has an option for every setting.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffusion_accel as api
from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.model_files.names import find_model
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.pipelines.schedulers import set_scheduler


def main() -> None:
    """Parse the arguments, load, quantize, print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sticker", help="embedded name, hub id, folder or .safetensors file")
    parser.add_argument("--bits", default="w8a8", help="such as w8a8, w4a8, w4a4, or w8, w4 for weights only")
    parser.add_argument("--minutes", type=float, help="about how long it may take")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt a line; the embedded model needs none")
    parser.add_argument("--count", type=int, default=64, help="prompts to use")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    source = find_model(args.model)
    if args.prompts is not None:
        prompts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif source.kind == "embedded":
        prompts = embedded_prompts(args.count)
    else:
        parser.error("--prompts is needed: grids are measured on the kind of prompts the model is used with")
    pipe = load_pipeline(source).to(args.device)
    settings = source.defaults
    if "scheduler" in settings:
        set_scheduler(pipe, settings["scheduler"])
    calls = {key: settings.get(key) for key in ("steps", "guidance_scale", "height", "width")}
    report = api.quantize(
        pipe,
        prompts[: args.count],
        bits=args.bits,
        output=args.output,
        minutes=args.minutes,
        source=source,
        load=load_pipeline,
        progress=lambda what, share=0.0, _left=None: print(f"{share:4.0%} {what}", flush=True),
        **calls,
    )
    print(report.text())


if __name__ == "__main__":
    main()
