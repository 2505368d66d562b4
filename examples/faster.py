"""Faster: some steps are computed, the others are forecast, and what that cost is measured.

    python examples/faster.py

Writes plain.png and faster.png.
"""

from diffusion_accel import Reuse, accelerate, compare, load_pipeline
from diffusion_accel.pipelines.schedulers import set_scheduler

pipe = load_pipeline("sticker")  # or a hub id, a folder, a single .safetensors file
set_scheduler(pipe, "dpm++")  # the plan is tuned for it, with 20 steps
call = {"height": 96, "width": 96, "guidance_scale": 3.0}

accelerate(pipe, Reuse(plan="tuned:balanced"))  # a model of your own: plan="auto"
found = compare(pipe, ["red apple, 3d style", "panda, flat style"], steps=20, rounds=1, **call)
print(found.report)
print(f"{found.time_ratio:.2f} times as fast, {found.flop_ratio:.2f} times less work (two images: a rough number)")
print(f"PSNR to every step computed: {found.fidelity.psnr_median:.1f} dB")

found.baseline[0].save("plain.png")
found.accelerated[0].save("faster.png")
pipe.acceleration.disable("reuse")  # bit-identical to never having had it
