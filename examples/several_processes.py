"""Several processes: one image, of which each computes a part; the result is that of one process.

    torchrun --nproc-per-node 2 examples/several_processes.py

Started by itself it is one process. Writes shared.png.
"""

import torch

from diffusion_accel import PatchParallel, accelerate, load_pipeline
from diffusion_accel.pipelines.schedulers import set_scheduler

pipe = load_pipeline("sticker")
set_scheduler(pipe, "dpm++")
accelerate(pipe, PatchParallel(mode="sync"))  # "displaced" waits for nothing, and is not exact

call = {"height": 96, "width": 96, "guidance_scale": 3.0, "num_inference_steps": 4}
image = pipe("red apple, 3d style", generator=torch.manual_seed(1), **call).images[0]  # the same in every process

if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
    print(pipe.acceleration.report())  # bytes that were sent, by kind
    image.save("shared.png")
