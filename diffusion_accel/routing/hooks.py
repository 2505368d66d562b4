"""Routing a denoiser: hooks that hide the inactive channels from the inputs of its blocks' branches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from diffusion_accel.denoisers import frames_of, residual_branches, residual_stream_blocks
from diffusion_accel.errors import UnsupportedPipelineError
from diffusion_accel.hooks import HookSet, bind_forward

from .masks import channel_mask, position, positions, window
from .recipe import Recipe

CONFIG_KEY = "_task_routing"  # diffusers keeps unknown config entries that begin with an underscore, silently


def trained_recipe(denoiser: nn.Module) -> Recipe | None:
    """The recipe that the denoiser was trained with, from its config; None if it was trained without routing."""
    values = getattr(getattr(denoiser, "config", None), "get", lambda _key: None)(CONFIG_KEY)
    return None if values is None else Recipe.from_dict(dict(values) if isinstance(values, Mapping) else values)


def not_routable(denoiser: nn.Module) -> str | None:
    """Why the channels of `denoiser` cannot be routed; None if they can."""
    if residual_branches(denoiser) or residual_stream_blocks(denoiser):
        return None
    return f"{type(denoiser).__name__} has no residual blocks or transformer blocks whose channels could be routed"


def route(denoiser: nn.Module, recipe: Recipe, hooks: HookSet | None = None) -> HookSet:
    """Route a bare denoiser, in training or inference, until `remove()` of what is returned: `hooks`, if given.

    Nothing is added to its parameters or buffers. A sample's window follows its own timestep, so timesteps may be mixed
    in a batch.

    Raises:
        UnsupportedPipelineError: the model has no blocks that can be routed.
    """
    reason = not_routable(denoiser)
    if reason:
        raise UnsupportedPipelineError(reason)
    state = RoutingState(recipe)
    if hooks is None:
        hooks = HookSet("diffusion_accel.task_routing")
    for block, module in enumerate(residual_branches(denoiser)):
        hooks.add(module, BranchHook(state, block))
    for block, module in enumerate(residual_stream_blocks(denoiser)):
        hooks.add(module, StreamHook(state, block), innermost=True)  # where a process has its part of the tokens
    hooks.add(denoiser, TimestepHook(state))
    return hooks


class RoutingState:
    """The masks of the forward pass that is running."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.positions = torch.zeros(1, dtype=torch.float64)
        self.position: float | None = None  # of the whole batch, where knowing it does not wait for a device
        self.frames = 1
        self._masks: dict[Any, torch.Tensor] = {}

    def begin(self, timestep: Any, sample: torch.Tensor, frames: int) -> None:
        """Note the timesteps of a forward pass over `sample`, whose rows are `frames` frames each; the masks follow."""
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.tensor(timestep)
        timestep = timestep.reshape(-1)
        if timestep.stride() == (0,):  # one timestep for the whole batch
            timestep = timestep[:1]
        self.frames, self.position = frames, None
        self._masks.clear()
        if len(timestep) == 1 and timestep.device.type == "cpu" and self.recipe.kind == "window":
            self.position = position(timestep.item(), self.recipe)
        else:
            self.positions = positions(timestep.to(sample.device), self.recipe)

    def mask(self, hidden: torch.Tensor, channels: int, block: int, spatial: tuple[int, ...] = ()) -> torch.Tensor:
        """(rows, channels, *spatial) in the dtype of `hidden`, or one row if all have the same timestep."""
        rows = hidden.shape[0]
        key = (channels, rows, hidden.dtype, spatial, block if self.recipe.kind == "random" else 0)
        if key not in self._masks and self.position is not None:
            first, end = window(self.position, channels, self.recipe)
            mask = torch.zeros(1, channels, *spatial, dtype=hidden.dtype, device=hidden.device)
            mask.narrow(1, first, end - first).fill_(1)
            self._masks[key] = mask
        elif key not in self._masks:
            where = self.positions
            if len(where) > 1:
                # reuse may run the encoder for the first rows of a batch only; video models have a row a frame
                where = where[: rows // self.frames].repeat_interleave(self.frames)
                if len(where) != rows:
                    where = where.repeat_interleave(rows // len(where))
            mask = channel_mask(where, channels, self.recipe, block).to(hidden.dtype)
            self._masks[key] = mask.view(*mask.shape, *spatial)
        return self._masks[key]


class TimestepHook(ModelHook):
    """On the denoiser: notes the timesteps of its rows."""

    def __init__(self, state: RoutingState) -> None:
        super().__init__()
        self.state = state

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Note the timestep of every row of the call."""
        named = bind_forward(module, args, kwargs)
        sample = named["sample"] if "sample" in named else named["hidden_states"]
        self.state.begin(named["timestep"], sample, frames_of(module, sample))
        return args, kwargs


class BranchHook(ModelHook):
    """On the first layer of a residual branch: x + f(x * m). The shortcut sees every channel."""

    def __init__(self, state: RoutingState, block: int) -> None:
        super().__init__()
        self.state = state
        self.block = block

    def pre_forward(self, _module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hide the inactive channels from the branch."""
        hidden = args[0]
        return (hidden * self.state.mask(hidden, hidden.shape[1], self.block, (1, 1)), *args[1:]), kwargs


class StreamHook(ModelHook):
    """On a transformer block, f(r) = r + attention + MLP: f(x * m) + x * (1 - m)."""

    def __init__(self, state: RoutingState, block: int) -> None:
        super().__init__()
        self.state = state
        self.block = block

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """Run the block on the active channels; the others pass by it unchanged."""
        named = bind_forward(module, args, kwargs)
        hidden = named["hidden_states"]
        mask = self.state.mask(hidden, hidden.shape[-1], self.block)[:, None]
        routed = hidden * mask
        named["hidden_states"] = routed
        output = self.fn_ref.original_forward(**named)
        hidden_part = hidden - routed  # exact: a channel is either kept or zero
        if isinstance(output, tuple):  # (text, image)
            return (output[0], output[1] + hidden_part, *output[2:])
        return output + hidden_part
