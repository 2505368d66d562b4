"""A tiny IP-Adapter and image encoder with random weights, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import zoo
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

WIDTH, PROJECTED = 16, 12  # of what the image encoder computes, and of what it gives


def image_encoder() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=PROJECTED,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
    )
    return zoo.seeded(lambda: CLIPVisionModelWithProjection(config))


def tensors(unet: Any, plus: bool = False) -> dict[str, torch.Tensor]:
    """An adapter for a U-Net by the names of its file; `plus` reads what the encoder computes before its last layer."""
    found: dict[str, torch.Tensor] = {}
    text = unet.config.cross_attention_dim
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(names):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for part, key in enumerate(("to_k_ip", "to_v_ip")):
            found[f"ip_adapter.{2 * number + 1}.{key}.weight"] = zoo.rand(width, text, seed=2 * number + part)
    if not plus:
        shapes = {"proj.weight": (4 * text, PROJECTED), "proj.bias": (4 * text,)}
        shapes |= {"norm.weight": (text,), "norm.bias": (text,)}
    else:
        shapes = {"latents": (1, 4, 64), "proj_in.weight": (64, WIDTH), "proj_in.bias": (64,)}
        shapes |= {"proj_out.weight": (text, 64), "proj_out.bias": (text,), "norm_out.weight": (text,)}
        shapes |= {"norm_out.bias": (text,)}
        for layer in (f"layers.{number}" for number in range(4)):
            for norm in (f"{layer}.0.norm1", f"{layer}.0.norm2", f"{layer}.1.0"):
                shapes |= {f"{norm}.weight": (64,), f"{norm}.bias": (64,)}
            shapes |= {f"{layer}.0.to_q.weight": (64, 64), f"{layer}.0.to_kv.weight": (128, 64)}
            shapes |= {f"{layer}.0.to_out.weight": (64, 64), f"{layer}.1.1.weight": (256, 64)}
            shapes |= {f"{layer}.1.3.weight": (64, 256)}
    for number, (name, shape) in enumerate(shapes.items()):
        found[f"image_proj.{name}"] = zoo.rand(*shape, seed=50 + number)
    return found


def write(folder: Path, unet: Any, *, plus: bool = False, encoder: bool = True) -> Path:
    """The file, and beside it the image encoder."""
    folder.mkdir(exist_ok=True, parents=True)
    save_file(tensors(unet, plus), folder / "ip.safetensors")
    if encoder:
        image_encoder().save_pretrained(folder / "image_encoder")
    return folder / "ip.safetensors"
