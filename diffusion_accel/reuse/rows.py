"""Rows of a denoiser's arguments: those of several steps in one batch, those of one branch of guidance."""

from __future__ import annotations

from typing import Any

import torch

from diffusion_accel.denoisers import RESIDUAL_ARGUMENTS, Branches, latents_of, lists_samples
from diffusion_accel.hooks import map_tensors


def can_stack(named: dict[str, Any]) -> bool:
    """Whether the rows of several steps can share a batch (per-call attention inputs may refer to row numbers)."""
    attention = named.get("cross_attention_kwargs") or {}
    return set(attention) <= {"scale", "ip_adapter_masks"} and latents_of(named).shape[0] > 0


def stacked(named: dict[str, Any], steps: int, timesteps: torch.Tensor) -> dict[str, Any]:
    """The U-Net's arguments for `steps` steps at once: rows of the first step, then of the second, …"""
    batch = named["sample"].shape[0]

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.shape[0] % batch:
            return tensor
        return tensor.repeat(steps, *([1] * (tensor.dim() - 1)))

    kept = {"timestep", "cross_attention_kwargs", *RESIDUAL_ARGUMENTS}
    together = {k: v if k in kept else map_tensors(repeat, v) for k, v in named.items()}
    together["timestep"] = timesteps.to(named["sample"].device).repeat_interleave(batch)
    return together


# Arguments without a row for each sample, whatever their first dimension is.
NOT_ROWS = frozenset({"image_rotary_emb", "rotary_embedding", "img_ids", "txt_ids", "position_ids"})


def conditional_rows(named: dict[str, Any], rows: int, branches: Branches, frames: bool) -> dict[str, Any]:
    """The denoiser's arguments for the conditional half of its rows; with `frames` also where a row has several."""
    listed = lists_samples(named)

    def half(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or (tensor.shape[0] % rows if frames else tensor.shape[0] != rows):
            return tensor
        return branches.conditional(tensor)

    def cut(name: str, value: Any) -> Any:
        if name in NOT_ROWS:
            return value
        if listed and isinstance(value, list) and len(value) == rows:
            return branches.conditional(value)
        if name == "cross_attention_kwargs":  # only GLIGEN's have rows
            return {k: map_tensors(half, v) if k == "gligen" else v for k, v in value.items()} if value else value
        return map_tensors(half, value)

    return {name: cut(name, value) for name, value in named.items()}
