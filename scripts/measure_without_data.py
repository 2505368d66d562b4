#!/usr/bin/env python3
"""What quantizing without data takes on a U-Net of SDXL's shape: minutes and memory.

    python scripts/measure_without_data.py --work runs/sdxl --bits w4
    python scripts/measure_without_data.py --work runs/sdxl --bits w8 --group 64
    python scripts/measure_without_data.py --work runs/sdxl --bits w4 --single-file

Writes a pipeline folder with random float16 weights (5.1 GB), or a single file in the layout of Stability AI with text
encoders and autoencoder of SDXL's shape as well (6.9 GB), kept for the next call; quantizes it in a process of its own,
and prints a line of JSON. The names of a single file are those of tests/original_files.py.
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
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

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
VAE: dict[str, Any] = {
    "sample_size": 1024,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CHILD = """
import json, resource, sys, time
import torch
torch.set_num_threads(int(sys.argv[5]))
from diffusion_accel import quantize_files
from diffusion_accel.quant.ptq.settings import parse_bits
weights, inputs = parse_bits(sys.argv[3])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.monotonic()
found = quantize_files(
    sys.argv[1], sys.argv[2], weight_bits=weights, activation_bits=inputs, group=int(sys.argv[4]),
    config=sys.argv[6] or None,
)
print(json.dumps({
    "seconds": round(time.monotonic() - began, 1),
    "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    "peak_gb_before": round(before / 2**20, 2),
    "parameters": found.parameters, "bytes": found.bytes,
}))
"""


def write_random(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of random float16 tensors."""
    random = np.random.default_rng(0)
    block = (0.02 * random.standard_normal(1 << 20, dtype=np.float32)).astype(np.float16)
    with TensorWriter(file, {name: ("F16", shape) for name, shape in shapes.items()}) as writer:
        for name, shape in shapes.items():
            count = math.prod(shape)
            parts = (block[: min(len(block), count - i)].tobytes() for i in range(0, count, len(block)))
            writer.put(name, parts)


def make(folder: Path) -> None:
    """The pipeline folder, unless it is there."""
    if (folder / "model_index.json").is_file():
        return
    with torch.device("meta"):
        model: Any = UNet2DConditionModel.from_config(SDXL)
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    model.save_config(folder / "unet")
    write_random(folder / "unet" / WEIGHTS, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    index = {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def make_single(file: Path, configs: Path) -> None:
    """The single file, and a folder with the configurations of its parts, unless they are there."""
    if file.is_file():
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from original_files import original  # only here: a helper of the tests

    with torch.device("meta"):
        models: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(SDXL),
            "vae": AutoencoderKL.from_config(VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L, projection_dim=768)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, projection_dim=1280)),
        }
    pipe = StableDiffusionXLPipeline(
        **models, scheduler=EulerDiscreteScheduler(), tokenizer=None, tokenizer_2=None, add_watermarker=False
    )
    configs.mkdir(parents=True, exist_ok=True)
    pipe.save_config(configs)
    pipe.scheduler.save_config(configs / "scheduler")
    for name, model in models.items():
        (model.config.save_pretrained if name.startswith("text") else model.save_config)(configs / name)
    written = file.with_suffix(".part")
    write_random(written, {name: tuple(tensor.shape) for name, tensor in original(pipe).items()})
    written.rename(file)


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sdxl"))
    parser.add_argument("--bits", default="w4")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--single-file", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    source, configs = options.work / "source", ""
    if options.single_file:
        source, configs = options.work / "source.safetensors", str(options.work / "configs")
        make_single(source, Path(configs))
    else:
        make(source)
    print(f"source: {time.monotonic() - began:.0f} s", file=sys.stderr)
    made = options.work / "made"
    shutil.rmtree(made, ignore_errors=True)
    given = (str(source), str(made), options.bits, str(options.group), str(options.threads), configs)
    done = subprocess.run([sys.executable, "-c", CHILD, *given], check=False)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
