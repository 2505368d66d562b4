"""A model under patch parallelism without a pipeline, and references for it that know nothing of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import zoo
from torch import nn

from diffusion_accel.denoisers import spatial_attentions
from diffusion_accel.hooks import HookSet
from diffusion_accel.parallel.communicator import Communicator
from diffusion_accel.parallel.group import join
from diffusion_accel.parallel.model_hooks import DenoiserHook, install_layers
from diffusion_accel.parallel.run import PatchRun
from diffusion_accel.parallel.token_hooks import install_tokens


@contextmanager
def split(model: nn.Module, mode: str, cfg: bool = False, **changes: Any) -> Iterator[PatchRun]:
    """Hooks on a bare model; the caller moves `run.clock.index`."""
    world = join(torch.device("cpu"), 60.0)
    settings = {"warmup": 1, "fraction": 0.3, "group_norm": "corrected", **changes}
    batch = settings.pop("batch", 7)  # so that one step sends several batches, the last one smaller
    clock = SimpleNamespace(index=0, call=0)
    run = PatchRun(world, clock, Communicator(world.group, batch), mode, **settings)
    hooks = HookSet("test.parallel")
    install_layers(hooks, run, model, "model", getattr(model, "conv_in", None))
    if hasattr(model, "conv_in"):
        hooks.add(model, DenoiserHook(run, cfg, lambda named: None))
    try:
        yield run
    finally:
        hooks.remove()
        run.communicator.close()


@contextmanager
def shared(model: nn.Module, mode: str, cfg: bool = False, **changes: Any) -> Iterator[PatchRun]:
    """The same of a transformer, whose tokens are shared."""
    with split(nn.Module(), mode, **changes) as run:
        hooks = HookSet("test.tokens")
        install_tokens(hooks, run, model, "model", cfg, lambda named: None)
        try:
            yield run
        finally:
            hooks.remove()


def warm(mode: str) -> dict[str, int]:
    """The fewest exact steps that a mode has."""
    return {"warmup": int(mode in ("displaced", "partial"))}


def unet(**changes: Any) -> nn.Module:
    return zoo.unet(**changes).double()


def deep_unet(**changes: Any) -> nn.Module:
    """Three halvings, with self-attention at every level."""
    blocks = {
        "block_out_channels": (16, 16, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }
    return zoo.unet(**{**blocks, **changes}).double()


def inputs(batch: int, height: int, width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        "sample": zoo.rand(batch, 4, height, width, seed=seed).double(),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": zoo.rand(batch, zoo.TOKENS, zoo.DIM, seed=1).double(),
    }


@torch.no_grad()
def predict(model: Any, **named: Any) -> torch.Tensor:
    return model(**named, return_dict=False)[0]


class MaskedAttention:
    """Self-attention in which a position sees only what `allowed(tokens)` says, (tokens, tokens) of bool."""

    def __init__(self, allowed: Callable[[int], torch.Tensor]) -> None:
        self.allowed = allowed

    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, **_: Any) -> Any:
        batch, tokens, _channels = hidden_states.shape
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        q, k, v = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
        mask = self.allowed(tokens) if encoder_hidden_states is None else None
        found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attn.to_out[0](found.transpose(1, 2).flatten(2))


def masked(model: nn.Module, allowed: Callable[[int], torch.Tensor]) -> nn.Module:
    for attention in spatial_attentions(model).values():
        attention.processor = MaskedAttention(allowed)
    return model


def predict_plain(named: dict[str, torch.Tensor]) -> torch.Tensor:
    return predict(unet(), **named)
