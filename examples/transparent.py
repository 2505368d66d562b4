"""Transparent: an image with soft alpha, laid over a colour.

    python examples/transparent.py

Writes panda.png (RGBA) and on-orange.png.
"""

import torch
from PIL import Image

from diffusion_accel import LatentTransparency, Reuse, accelerate, load_pipeline
from diffusion_accel.pipelines.schedulers import set_scheduler

pipe = load_pipeline("sticker")
set_scheduler(pipe, "dpm++")
# weights for SD 1.5 and SDXL: LatentTransparency(weights="LayerDiffusion/layerdiffusion-v1")
accelerate(pipe, LatentTransparency(), Reuse(plan="tuned:balanced"))  # features combine

call = {"height": 96, "width": 96, "guidance_scale": 3.0, "num_inference_steps": 20}
panda = pipe("panda, 3d style", generator=torch.manual_seed(1), **call).images[0]
print(panda.mode, panda.size)
panda.save("panda.png")

below = Image.new("RGBA", panda.size, "#ff8800")
below.alpha_composite(panda)
below.convert("RGB").save("on-orange.png")
