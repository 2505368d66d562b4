#!/usr/bin/env python3
"""What quantizing without data takes on a U-Net of SDXL's shape: minutes and memory.

    python scripts/measure_without_data.py --work runs/sdxl --bits w4
    python scripts/measure_without_data.py --work runs/sdxl --bits w8 --group 64

Writes a pipeline folder with random float16 weights (5.1 GB, kept for the next call), quantizes it in a process of its
own, and prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from diffusion_accel.quant.stored import TensorWriter
from diffusion_accel.quant.without_data import WEIGHTS

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CHILD = """
import json, resource, sys, time
import torch
torch.set_num_threads(int(sys.argv[5]))
from diffusion_accel import quantize_files
from diffusion_accel.quant.ptq.settings import parse_bits
weights, inputs = parse_bits(sys.argv[3])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.monotonic()
found = quantize_files(sys.argv[1], sys.argv[2], weight_bits=weights, activation_bits=inputs, group=int(sys.argv[4]))
print(json.dumps({
    "seconds": round(time.monotonic() - began, 1),
    "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    "peak_gb_before": round(before / 2**20, 2),
    "parameters": found.parameters, "bytes": found.bytes,
}))
"""


def make(folder: Path) -> None:
    """The pipeline folder, unless it is there."""
    if (folder / "model_index.json").is_file():
        return
    with torch.device("meta"):
        model: Any = UNet2DConditionModel.from_config(SDXL)
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    model.save_config(folder / "unet")
    tensors = {name: ("F16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    random = np.random.default_rng(0)
    block = (0.02 * random.standard_normal(1 << 20, dtype=np.float32)).astype(np.float16)
    with TensorWriter(folder / "unet" / WEIGHTS, tensors) as file:
        for name, (_, shape) in tensors.items():
            count = math.prod(shape)
            parts = (block[: min(len(block), count - i)].tobytes() for i in range(0, count, len(block)))
            file.put(name, parts)
    index = {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sdxl"))
    parser.add_argument("--bits", default="w4")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    began = time.monotonic()
    make(options.work / "source")
    print(f"source: {time.monotonic() - began:.0f} s", file=sys.stderr)
    made = options.work / "made"
    shutil.rmtree(made, ignore_errors=True)
    given = (str(options.work / "source"), str(made), options.bits, str(options.group), str(options.threads))
    done = subprocess.run([sys.executable, "-c", CHILD, *given], check=False)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
