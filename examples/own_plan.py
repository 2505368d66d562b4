"""An own plan: which steps a model must compute, found out in seconds; ten minutes find a better one.

    python examples/own_plan.py

Writes plan.json and planned.png.
"""

from pathlib import Path

import torch

from diffusion_accel import Reuse, accelerate, load_pipeline, tune
from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.pipelines.schedulers import set_scheduler

pipe = load_pipeline("sticker")
set_scheduler(pipe, "ddim")  # a plan belongs to a model, a scheduler and a number of steps
call = {"height": 96, "width": 96, "guidance_scale": 3.0}

prompts = embedded_prompts(6)  # 24 or more of your own are recommended
plan = tune(pipe, prompts, steps=10, speedup=1.6, seconds=5, **call)
print(plan.plan.text)
print(plan.measured)  # on prompts that the search did not see
plan.save(Path("plan.json"))

accelerate(pipe, Reuse(plan="plan.json"))
image = pipe("red apple, 3d style", generator=torch.manual_seed(1), num_inference_steps=10, **call).images[0]
print(pipe.acceleration.report())
image.save("planned.png")
