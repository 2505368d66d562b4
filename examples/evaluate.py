"""Evaluate: does an accelerated model still draw what it is asked for?

    python examples/evaluate.py

Distances to real stickers, plain and accelerated, of few images: 64 and more say something. Writes drawn.png.
"""

from diffusion_accel import Reuse, accelerate, evaluate, load_pipeline
from diffusion_accel.pipelines.schedulers import set_scheduler

pipe = load_pipeline("sticker")
set_scheduler(pipe, "dpm++")
call = {"steps": 20, "guidance_scale": 3.0, "height": 96, "width": 96}

accelerate(pipe, Reuse(plan="tuned:fast"))
for setting in ("every step", "tuned:fast"):
    pipe.acceleration.enable("reuse") if setting == "tuned:fast" else pipe.acceleration.disable("reuse")
    found = evaluate(pipe, count=4, **call)
    for part, numbers in found.parts.items():  # captions that the model was trained on, and held-out ones
        print(f"{setting}, {part}: {numbers}")
found.write_grid("drawn.png")
