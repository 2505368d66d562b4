"""Pipelines as single files in the layout of their authors, written from a pipeline of diffusers by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
CLIP_OF_XL, OPEN_CLIP_OF_XL = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _changed(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = re.sub(rf"(^|\.){re.escape(old)}\.", rf"\g<1>{new}.", name)
    return name


def unet_name(name: str, model: Any) -> str:
    """The name of a U-Net's parameter in the layout of latent diffusion."""
    each = model.config.layers_per_block + 1
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        side, block, part, number, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if part == "downsamplers":
            return f"input_blocks.{(block + 1) * each}.0.{rest.replace('conv', 'op')}"
        if part == "upsamplers":
            attends = hasattr(model.up_blocks[block], "attentions")
            return f"output_blocks.{block * each + each - 1}.{2 if attends else 1}.{rest}"
        place = (
            f"input_blocks.{1 + block * each + number}" if side == "down" else f"output_blocks.{block * each + number}"
        )
        return f"{place}.1.{rest}" if part == "attentions" else f"{place}.0.{_changed(rest, _RESNET)}"
    changed = _changed(name, _UNET)
    return _changed(changed, _RESNET) if changed.startswith(("middle_block.0", "middle_block.2")) else changed


def vae_name(name: str, blocks: int) -> str:
    """The name of an autoencoder's parameter in the layout of latent diffusion."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    return _changed(name, _VAE)


_OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a `CLIPTextModelWithProjection` as OpenCLIP has them."""
    found = {to: state[name] for name, to in _OPEN_CLIP.items()}
    found["text_projection"] = state["text_projection.weight"].T
    layers = "text_model.encoder.layers."
    for name, value in state.items():
        if name.startswith(layers) and not re.search(r"\.[kqv]_proj\.", name):
            found[f"transformer.resblocks.{_changed(name.removeprefix(layers), _LAYER)}"] = value
        elif name.endswith((".q_proj.weight", ".q_proj.bias")):
            place, leaf = name.removeprefix(layers).split(".")[0], name.rpartition(".")[2]
            stacked = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            found[f"transformer.resblocks.{place}.attn.in_proj_{leaf}"] = torch.cat(stacked)
    return found


def original(pipe: Any) -> dict[str, torch.Tensor]:
    """The tensors of a pipeline's U-Net, autoencoder and text encoders in the names of latent diffusion."""
    found = {UNET + unet_name(name, pipe.unet): value for name, value in pipe.unet.state_dict().items()}
    for name, value in pipe.vae.state_dict().items():
        key = VAE + vae_name(name, len(pipe.vae.config.block_out_channels))
        is_projection = "attn_1" in key and value.dim() == 2
        found[key] = value[:, :, None, None] if is_projection else value  # 1x1 convolutions there
    second = getattr(pipe, "text_encoder_2", None)
    if pipe.text_encoder is not None:
        prefix = CLIP if second is None else CLIP_OF_XL
        for name, value in pipe.text_encoder.state_dict().items():
            found[prefix + name.removeprefix("text_model.")] = value
    if second is not None:
        found |= {OPEN_CLIP_OF_XL + name: value for name, value in open_clip(second.state_dict()).items()}
    found["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    return {name: value.contiguous() for name, value in found.items()}


def write_original(pipe: Any, file: Path) -> Path:
    """The pipeline as a single file."""
    save_file(original(pipe), file)
    return file
