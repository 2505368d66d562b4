"""Transparency weights with random numbers for the tiny models of the zoo."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from zoo import sd, seeded

from diffusion_accel.denoisers import ordered_attentions
from diffusion_accel.transparency.files import ADAPTER
from diffusion_accel.transparency.modules import LatentTransparencyDecoder, LatentTransparencyEncoder

# names and shapes of the published weights
PUBLISHED = json.loads((Path(__file__).parent / "transparency" / "published_keys.json").read_text())


def tiny_encoder(**changes: Any) -> LatentTransparencyEncoder:
    """For latents of 4 channels and half the sides, as the zoo's VAE has them."""
    sizes = {"latent_channels": 4, "block_out_channels": (4, 8), "offset_scale": 3.0}
    return seeded(lambda: LatentTransparencyEncoder(**{**sizes, **changes}))


def tiny_decoder(**changes: Any) -> LatentTransparencyDecoder:
    sizes = {"block_out_channels": (8, 8, 16), "latent_level": 1, "attention_levels": 1, "layers_per_block": 1}
    return seeded(lambda: LatentTransparencyDecoder(**{**sizes, **changes}))


def tiny_changes(unet: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """A whole difference of a convolution, one of a norm, and low-rank factors of a projection."""
    generator = torch.Generator().manual_seed(seed)

    def small(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    name = next(n for n, _ in unet.named_modules() if n.endswith("attn1.to_q"))
    projection = unet.get_submodule(name)
    return {
        "conv_in.weight": small(*unet.conv_in.weight.shape),
        "conv_in.bias": small(*unet.conv_in.bias.shape),
        "conv_norm_out.weight": small(*unet.conv_norm_out.weight.shape),
        f"{name}.lora_A.weight": small(2, projection.in_features),
        f"{name}.lora_B.weight": small(projection.out_features, 2) * 4,
    }


def write_weights(folder: Path, unet: Any) -> str:
    tiny_encoder().save_pretrained(folder / "encoder")
    tiny_decoder().save_pretrained(folder / "decoder")
    save_file(tiny_changes(unet), folder / ADAPTER)
    return str(folder)


def tiny_weights() -> str:
    """A folder with weights for `zoo.sd()`, removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="transparency-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_weights(folder, sd()[0].unet)


def sharing_tensors(model: Any, frames: int, control: bool = False, rank: int = 2) -> dict[str, torch.Tensor]:
    """Random modules with the published names."""
    generator, tensors = torch.Generator().manual_seed(0), {}

    def small(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    for number, layer in enumerate(ordered_attentions(model)):
        for name in ("to_q", "to_k", "to_v", "to_out"):
            linear = layer.to_out[0] if name == "to_out" else getattr(layer, name)
            for f in range(frames):
                start = f"hookers.layers.{number}.{name}_lora.{f}"
                tensors[f"{start}.down.weight"] = small(rank, linear.in_features)
                tensors[f"{start}.up.weight"] = small(linear.out_features, rank)
        width = layer.to_k.out_features
        for part in "iqkvo":
            tensors[f"hookers.layers.{number}.temporal_{part}.weight"] = small(width, width)
            tensors[f"hookers.layers.{number}.temporal_{part}.bias"] = small(width)
        tensors[f"hookers.layers.{number}.temporal_n.weight"] = 1 + small(width)
        tensors[f"hookers.layers.{number}.temporal_n.bias"] = small(width)
        for f in range(frames if control else 0):
            start = f"hookers.layers.{number}.control_convs.{f}"
            tensors |= {f"{start}.0.weight": small(256, 256, 3, 3) * 0.05, f"{start}.0.bias": small(256)}
            tensors |= {f"{start}.2.weight": small(width, 256, 1, 1) * 0.2, f"{start}.2.bias": small(width)}
    if control:
        for name, shape in PUBLISHED["sharing_2_control"].items():
            if name.startswith("kwargs_encoder."):
                tensors[name] = small(*shape) * 0.3
    return tensors


def draw(pipe: Any, call: dict[str, Any], output: str = "pil", steps: int = 3, **changes: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(num_inference_steps=steps, generator=generator, **{**call, "output_type": output, **changes})


WEIGHTS = tiny_weights()
