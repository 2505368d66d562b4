"""Smaller: weights of 8 bits, from files to files, without data; diffusers loads the folder by itself.

    python examples/smaller.py

Writes the folder sticker-w8 and small.png.
"""

import torch
from diffusers import DiffusionPipeline

from diffusion_accel import quantize_files
from diffusion_accel.model_files.names import EMBEDDED

model = EMBEDDED["sticker"].path  # a pipeline folder with safetensors weights
report = quantize_files(model, "sticker-w8", weight_bits=8, overwrite=True)
print(report.text())

pipe = DiffusionPipeline.from_pretrained("sticker-w8")  # importing diffusion_accel is all that this needs
call = {"height": 96, "width": 96, "guidance_scale": 3.0, "num_inference_steps": 20}
pipe("red apple, 3d style", generator=torch.manual_seed(1), **call).images[0].save("small.png")
