"""A learned solver: 8 evaluations of the model, with timesteps and combinations that were fitted to it.

    python examples/learned_solver.py

Writes learned.png and stock.png, and prints how near each is to 60 steps.
"""

from typing import Any

import torch

from diffusion_accel import LearnedMultistepScheduler, fidelity, load_pipeline
from diffusion_accel.pipelines.schedulers import set_scheduler

pipe = load_pipeline("sticker")
call = {"height": 96, "width": 96, "guidance_scale": 3.0}


def draw(steps: int) -> Any:
    """The same apple with the scheduler that the pipeline has now."""
    return pipe("red apple, 3d style", generator=torch.manual_seed(1), num_inference_steps=steps, **call).images


set_scheduler(pipe, "dpm++")
converged, stock = draw(60), draw(8)
pipe.scheduler = LearnedMultistepScheduler.for_model("sticker")  # your model: tune_solver(pipe, prompts, [6, 8])
learned = draw(8)

print(f"8 steps of DPM-Solver++: {fidelity(converged, stock).psnr_median:.1f} dB")
print(f"8 learned evaluations:   {fidelity(converged, learned).psnr_median:.1f} dB")
stock[0].save("stock.png")
learned[0].save("learned.png")
