"""Encoder propagation written a second time, without hooks: a plain loop that calls the blocks of a U-Net by hand."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel


def embeddings(unet: UNet2DConditionModel, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, added: Any) -> Any:
    temb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t))
    extra = unet.get_aug_embed(emb=temb, encoder_hidden_states=text, added_cond_kwargs=added)
    return temb if extra is None else temb + extra


def encode(unet: UNet2DConditionModel, x: torch.Tensor, temb: torch.Tensor, text: torch.Tensor) -> Any:
    h = unet.conv_in(x)
    skips = [h]
    for block in unet.down_blocks:
        attention = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        h, more = block(hidden_states=h, temb=temb, **attention)
        skips.extend(more)
    return unet.mid_block(h, temb, encoder_hidden_states=text), skips


def decode(unet: UNet2DConditionModel, h: torch.Tensor, skips: list, temb: torch.Tensor, text: torch.Tensor) -> Any:
    skips = list(skips)
    for block in unet.up_blocks:
        n = len(block.resnets)
        taken, skips = tuple(skips[-n:]), skips[:-n]
        attention = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        h = block(hidden_states=h, res_hidden_states_tuple=taken, temb=temb, **attention)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel, scheduler: Any, latents: torch.Tensor, text: torch.Tensor, guidance: float,
    steps: int, keys: set[int], added: Any = None, alpha: float = 0.0, noise_before_unet: bool = True, tau: float = 0.5,
) -> torch.Tensor:  # fmt: skip
    scheduler.set_timesteps(steps)
    x = latents * scheduler.init_noise_sigma
    initial, kept = x.clone(), None
    for i, t in enumerate(scheduler.timesteps):
        inject = alpha > 0 and t / 1000 < tau
        if inject and noise_before_unet:
            x = x + alpha * initial
        batch = scheduler.scale_model_input(torch.cat([x, x]), t)
        temb = embeddings(unet, batch, t, text, added)
        if i in keys:
            kept = encode(unet, batch, temb, text)
        uncond, cond = decode(unet, *kept, temb, text).chunk(2)
        if inject and not noise_before_unet:
            x = x + alpha * initial
        x = scheduler.step(uncond + guidance * (cond - uncond), t, x).prev_sample
    return x
