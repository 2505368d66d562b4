"""Hooks on the parts of a U-Net: its encoder, its up blocks, and single layers for shallow steps."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from diffusion_accel.denoisers import BATCH_ARGUMENTS, UNetLayers, unet_layers, unet_stages
from diffusion_accel.hooks import bind_forward, first_argument, map_tensors

from .plan import Kinds
from .state import DenoiserCall, ReuseState


def missing_parts(denoiser: nn.Module, kinds: Kinds) -> str | None:
    """Why a U-Net cannot run the kinds of steps of plans; None if it can."""
    if not kinds.depths:
        return None
    try:
        layers = unet_layers(denoiser)
    except ValueError as error:
        return f"shallow steps are not possible: {error}; use hold:n or uniform:m"
    if max(kinds.depths) > layers.count:
        return (
            f"{type(denoiser).__name__} has {layers.count} skip connections: the depth of a shallow step must "
            f"be 1 to {layers.count}, got {max(kinds.depths)}"
        )
    return None


def install_parts(state: ReuseState, denoiser: nn.Module) -> None:
    """The hooks on a U-Net that the kinds of steps of `state` need; see `missing_parts`."""
    kinds = state.kinds
    decoding, depths = kinds.orders("decoder") >= 0, sorted(kinds.depths)
    if not decoding and not depths:
        return
    stages = unet_stages(denoiser)
    none = UNetLayers(((),) * len(stages.down), ((),) * len(stages.up), 0)
    layers = unet_layers(denoiser) if depths else none
    down, up = layers.down, layers.up
    for direction, blocks in (("down", down), ("up", up)):
        for units in blocks:
            numbers = [number for number, _ in units]
            for number, modules in units:
                split = any(min(numbers) < depth <= max(numbers) for depth in depths)
                entered = direction == "up" and number + 1 in depths
                for j, module in enumerate(modules):
                    if split or (entered and j == 0):
                        state.hooks.add(module, LayerHook(state, number, entered and j == 0))
    head = len(stages.head)
    for i, stage in enumerate(stages.encoder):
        in_block = [number for number, _ in down[i - head]] if head <= i < head + len(down) else []
        state.hooks.add(stage, EncoderStageHook(state, i, -1 if i < head else min(in_block, default=_DEEPEST)))
    for i, stage in enumerate(stages.up):
        state.hooks.add(stage, UpBlockHook(state, i, tuple(number for number, _ in up[i]), decoding))


_DEEPEST = 10**6  # further in than any skip connection


@dataclass(frozen=True)
class Outline:
    """The shape of a tensor that was not computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    channels_last: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Outline:
        """The shape of a tensor that was."""
        last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        return cls(tuple(map(int, tensor.shape)), tensor.dtype, tensor.device, last and not tensor.is_contiguous())

    def empty(self, rows: int, of: int) -> torch.Tensor:
        """Memory of this shape with `rows` / `of` of its rows; what is in it is never used."""
        shape = (self.shape[0] * rows // of, *self.shape[1:])
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=layout)

    def stub(self) -> torch.Tensor:
        """A tensor of this shape without memory of its own."""
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)


def _outlined(current: DenoiserCall, key: Hashable, output: Any, steps: int = 1) -> Any:
    """Note the shapes of an output of a full step with the rows of so many steps, and return it."""
    if current.full:
        current.left["outlines"][key] = (current.rows * steps, map_tensors(Outline.of, output))
    return output


def _skipped(current: DenoiserCall, key: Hashable) -> Any:
    """What stands for the output of a part that is not computed."""
    rows, outline = current.features.outlines[key]
    if current.step.mode == "decoder":  # nothing reads it
        return map_tensors(Outline.stub, outline, Outline)
    return map_tensors(lambda o: o.empty(current.rows, rows), outline, Outline)


class PartHook(ModelHook):
    """On a part of the U-Net; `first` is the outermost skip connection that it takes part in."""

    def __init__(self, state: ReuseState, number: int, first: int) -> None:
        super().__init__()
        self.state = state
        self.number = number
        self.first = first

    def skipped(self, current: DenoiserCall) -> bool:
        """Whether this step leaves the part out."""
        return current.step.mode == "shallow" and self.first >= current.step.depth


class EncoderStageHook(PartHook):
    """On conv_in, each down block and the mid block: runs the stage, or only pretends to."""

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """The stage's own forward, or what stands for its outputs."""
        current = self.state.current
        if current is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        key = ("encoder", self.number)
        if current.step.mode == "decoder" or self.skipped(current):
            return _skipped(current, key)
        if current.steps > 1:
            # The batch was stacked for the decoder; the encoder needs its first rows only.
            if self.number == 0:
                args, kwargs = map_tensors(lambda t: _first(t, current.steps), (args, kwargs))
            else:
                named = bind_forward(module, args, kwargs)
                for name in BATCH_ARGUMENTS & named.keys():
                    named[name] = map_tensors(lambda t: _first(t, current.steps), named[name])
                args, kwargs = (), named
        return _outlined(current, key, self.fn_ref.original_forward(*args, **kwargs))


class UpBlockHook(PartHook):
    """On each up block: keeps its inputs at full steps and puts them in at decoder steps, for all steps of a group."""

    def __init__(self, state: ReuseState, number: int, skips: tuple[int, ...], decoding: bool) -> None:
        super().__init__(state, number, min(skips, default=0))
        self.skips = skips
        self.decoding = decoding

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """The block's own forward, on the inputs that are kept if this is a decoder step."""
        current = self.state.current
        if current is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        key = ("up", self.number)
        if self.skipped(current):
            return _skipped(current, key)
        if self.decoding or self.skips:
            named = bind_forward(module, args, kwargs)
            args, kwargs = (), named
            for i, skip in enumerate(self.skips):
                current.widths[skip] = named["res_hidden_states_tuple"][-1 - i].shape[1]
        if self.decoding and current.step.mode in ("full", "decoder"):
            names = ("hidden_states", "res_hidden_states_tuple")[self.number > 0 :]
            if current.full:
                kept = {name: named[name] for name in names}
                if self.number == 0:
                    kept["hidden_states"] = kept["hidden_states"].clone()  # FreeU scales the original in place
                current.keep(("decoder", self.number), kept)
            if not current.full or current.steps > 1:
                named.update(current.recall(("decoder", self.number)))
                if self.number == 0:
                    named["hidden_states"] = named["hidden_states"].clone()
            kwargs = named
        return _outlined(current, key, self.fn_ref.original_forward(*args, **kwargs), current.steps)


class LayerHook(PartHook):
    """On the modules of one layer: leaves them out, or enters the decoder there with the kept deep feature.

    A residual block of the decoder takes in [what comes from below, skip connection]: where a shallow step enters, the
    first part is the deep feature. It is taken and put in here, not where it comes from, so that whatever the block
    does in between (FreeU) was done to it.
    """

    def __init__(self, state: ReuseState, number: int, entered: bool) -> None:
        super().__init__(state, number, number)
        self.entered = entered

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """The module's own forward, on the kept deep feature where a shallow step enters, or nothing of it."""
        current = self.state.current
        if current is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        key = ("layer", id(module))
        if self.skipped(current):
            return _skipped(current, key)
        if self.entered and (current.full or current.step.depth == self.number + 1):
            hidden = first_argument(module, args, kwargs)
            channels = hidden.shape[1] - current.widths[self.number]
            if current.full:
                last = hidden.is_contiguous(memory_format=torch.channels_last)
                layout = torch.channels_last if last else torch.contiguous_format
                part = _first(hidden, current.steps)[:, :channels].clone(memory_format=layout)
                current.keep(("shallow", self.number + 1), part)
            else:
                hidden[:, :channels] = current.recall(("shallow", self.number + 1))
        return _outlined(current, key, self.fn_ref.original_forward(*args, **kwargs), current.steps)


def _first(tensor: torch.Tensor, steps: int) -> torch.Tensor:
    return tensor[: tensor.shape[0] // steps]
