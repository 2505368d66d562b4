"""SD 1.5's attention sharing: layers of one image, drawn as frames that see each other.

The batch is (b f): the frames of an image follow each other. Each of the 32 attention layers gets, for every frame,
low-rank updates of its projections, and after it an attention across the frames of each token (LayerDiffuse, section
3.3, and its published modules, whose state dict this reads).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks import ModelHook
from torch import nn

from diffusion_accel.denoisers import ordered_attentions
from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.hooks import HookSet
from diffusion_accel.io import printable

from .rgba import resized

_LAYERS = "hookers.layers."
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
_UNIT = re.compile(re.escape(_LAYERS) + r"(\d{1,4})\.(\w+)\.(\w+)(?:\.\w+){0,2}")
_SIGNAL = 256  # channels of what the given layer's encoder makes
_CONTROL = [  # its convolutions and their outputs
    *((f"kwargs_encoder.blocks_0.{2 * k}", width) for k, width in enumerate((32, 32, 64, 64, 128, 128, 256, 256))),
    *((f"kwargs_encoder.blocks_{block}.{k}", _SIGNAL) for block in (1, 2, 3) for k in (0, 2)),
]
_EPSILON = 1e-6  # of the layer norm before the attention across frames


def is_sharing(names: Iterable[str]) -> bool:
    """Whether a file's keys are those of attention-sharing modules."""
    return any(name.startswith(_LAYERS) for name in names)


class Sharing:
    """The modules of one file, and their hooks on a U-Net while a call runs."""

    def __init__(self, file: Path, tensors: dict[str, torch.Tensor], unet: Any, frames: int) -> None:
        self.frames = frames
        self.tensors = {name: value.float() for name, value in tensors.items()}
        self.paused = False
        self.control: torch.Tensor | None = None  # (1, 3, H, W) in 0..1
        self.signals: dict[int, torch.Tensor] = {}
        layers = ordered_attentions(unet)
        parts = [_UNIT.fullmatch(name) for name in self.tensors]
        numbers = {int(part[1]) for part in parts if part}
        if numbers != set(range(len(layers))):
            raise ModelLoadError(
                f"{file.name} shares {len(numbers)} attention layers, this {type(unet).__name__} has {len(layers)}: "
                "it is for SD 1.5"
            )
        there = {part[3] for part in parts if part and part[2] == "to_q_lora"}
        if there != {str(f) for f in range(frames)}:
            raise ModelLoadError(f"{file.name} draws {len(there)} layers together, the variant draws {frames}")
        for number, layer in enumerate(layers):
            down = self.tensors.get(f"{_LAYERS}{number}.to_k_lora.0.down.weight")
            if down is not None and down.dim() == 2 and down.shape[1] != layer.to_k.in_features:
                raise ModelLoadError(
                    f"{file.name}: attention {number} takes {down.shape[1]} features, this {type(unet).__name__}'s "
                    f"takes {layer.to_k.in_features}: it is for another family of models"
                )
        self._check(file, layers)

    def _check(self, file: Path, layers: list[Any]) -> None:
        """Raise `ModelLoadError` unless exactly the tensors that the modules need are there, each of its shape."""
        found = {name: tuple(value.shape) for name, value in self.tensors.items()}
        wanted: dict[str, tuple[int, ...]] = {}
        for number, layer in enumerate(layers):
            start, width = f"{_LAYERS}{number}.", layer.to_k.out_features
            for name in _PROJECTIONS:
                linear = layer.to_out[0] if name == "to_out" else getattr(layer, name)
                for f in range(self.frames):
                    rank = (found.get(f"{start}{name}_lora.0.down.weight") or (1,))[0]
                    wanted[f"{start}{name}_lora.{f}.down.weight"] = (rank, linear.in_features)
                    wanted[f"{start}{name}_lora.{f}.up.weight"] = (linear.out_features, rank)
            for part in "iqkvo":
                wanted[f"{start}temporal_{part}.weight"] = (width, width)
                wanted[f"{start}temporal_{part}.bias"] = (width,)
            wanted |= {f"{start}temporal_n.{part}": (width,) for part in ("weight", "bias")}
            for f in range(self.frames if self.needs_control else 0):
                first, second = f"{start}control_convs.{f}.0", f"{start}control_convs.{f}.2"
                wanted |= {f"{first}.weight": (_SIGNAL, _SIGNAL, 3, 3), f"{first}.bias": (_SIGNAL,)}
                wanted |= {f"{second}.weight": (width, _SIGNAL, 1, 1), f"{second}.bias": (width,)}
        if self.needs_control:
            for (name, outputs), inputs in zip(_CONTROL, (3, *(width for _, width in _CONTROL)), strict=False):
                wanted |= {f"{name}.weight": (outputs, inputs, 3, 3), f"{name}.bias": (outputs,)}
        for name in sorted({*wanted, *found}):
            if wanted.get(name) != found.get(name):
                have = "nothing of this kind has it" if name not in wanted else f"it should be {wanted[name]}"
                shape = found.get(name, "missing")
                raise ModelLoadError(f"{file.name} is damaged: {printable(name)} is {shape}, {have}; get a fresh copy")

    @property
    def needs_control(self) -> bool:
        """Whether the file has an encoder for a given layer."""
        return any(name.startswith("kwargs_encoder.") for name in self.tensors)

    def pause(self) -> None:
        """From here on the base model acts as without the modules."""
        self.paused = True

    def install(self, unet: Any, hooks: HookSet, strength: float = 1.0, control: torch.Tensor | None = None) -> None:
        """Put the hooks on; `control` (1, 4, H, W) in 0..1 is the layer that is given, if one is.

        `strength` scales everything that is added: the low-rank updates, the attention across frames and what the
        given layer adds. 1 is as published; towards 0 the base model is reached.
        """
        self.paused, self.signals = False, {}
        self.control = None if control is None else control[:, :3] * control[:, 3:] + (1 - control[:, 3:]) * 0.5
        hooks.add(unet, _Entry(self))
        for number, layer in enumerate(ordered_attentions(unet)):
            mine = {
                name.removeprefix(f"{_LAYERS}{number}."): value
                for name, value in self.tensors.items()
                if name.startswith(f"{_LAYERS}{number}.")
            }
            for name in _PROJECTIONS:
                linear = getattr(layer, name)[0] if name == "to_out" else getattr(layer, name)
                factors = [
                    torch.stack([mine[f"{name}_lora.{f}.{part}.weight"] for f in range(self.frames)])
                    for part in ("down", "up")
                ]
                hooks.add(linear, _FrameLowRank(self, factors[0], factors[1] * strength))
            hooks.add(layer, _AcrossFrames(self, mine, layer.heads, strength))

    def encode_control(self, height: int, width: int, like: torch.Tensor) -> None:
        """Features of the given layer for every resolution, by their number of tokens; `height`, `width` in pixels."""
        if self.control is None or self.signals:
            return
        ones = torch.ones_like(self.control[:, :1])
        x = resized(torch.cat([self.control, ones], 1), height, width)[:, :3].to(like) * 2 - 1
        for block in range(4):
            prefix = f"kwargs_encoder.blocks_{block}."
            numbers = sorted({int(name.split(".")[2]) for name in self.tensors if name.startswith(prefix)})
            for k in numbers:
                weight, bias = (self.tensors[f"{prefix}{k}.{part}"].to(like) for part in ("weight", "bias"))
                down = (block == 0 and k in (4, 8, 12)) or (block > 0 and k == 0)
                x = F.silu(F.conv2d(x, weight, bias, stride=2 if down else 1, padding=1))
            self.signals[x.shape[-2] * x.shape[-1]] = x


class _Entry(ModelHook):
    """Checks the batch and encodes the given layer before the U-Net runs."""

    def __init__(self, sharing: Sharing) -> None:
        super().__init__()
        self.sharing = sharing

    def pre_forward(self, _module: Any, *args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs["sample"]
        if len(sample) % self.sharing.frames:
            raise ConfigurationError(
                f"this variant draws {self.sharing.frames} layers together: the number of images must be a multiple "
                f"of {self.sharing.frames}, got {len(sample)} rows"
            )
        self.sharing.encode_control(sample.shape[-2] * 8, sample.shape[-1] * 8, sample)
        return args, kwargs


class _FrameLowRank(ModelHook):
    """Adds to a projection what the low-rank update of each frame makes of its rows."""

    def __init__(self, sharing: Sharing, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.sharing, self.down, self.up = sharing, down, up

    def new_forward(self, _module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made = self.fn_ref.original_forward(*args, **kwargs)
        if self.sharing.paused:
            return made
        x = args[0] if args else kwargs["input"]
        self.down, self.up = self.down.to(x), self.up.to(x)
        framed = x.unflatten(0, (-1, self.sharing.frames))  # (b, f, n, c) against (f, c, r) and (f, r, c)
        added = framed @ self.down.transpose(1, 2) @ self.up.transpose(1, 2)
        return made + added.flatten(0, 1)


class _AcrossFrames(ModelHook):
    """The attention across frames behind an attention layer, and the given layer's features before it."""

    def __init__(self, sharing: Sharing, tensors: dict[str, torch.Tensor], heads: int, strength: float = 1.0) -> None:
        super().__init__()
        self.sharing, self.tensors, self.heads, self.strength = sharing, tensors, heads, strength
        self._control: dict[int, torch.Tensor] = {}

    def new_forward(self, _module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.sharing.paused:
            return self.fn_ref.original_forward(*args, **kwargs)
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        x = hidden + self._given(hidden) * self.strength
        x = x + self.fn_ref.original_forward(x, *rest, **kwargs)
        x = x + self._across(x) * self.strength
        return x - hidden  # the block adds `hidden` again

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, *self._pair(name, x))

    def _pair(self, name: str, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias, where and as `like` is; moved there once."""
        for part in ("weight", "bias"):
            self.tensors[f"{name}.{part}"] = self.tensors[f"{name}.{part}"].to(like)
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

    def _across(self, x: torch.Tensor) -> torch.Tensor:
        """Attention among the frames of each token: (b f, n, c) -> the same."""
        width, frames = x.shape[-1], self.sharing.frames
        weight, bias = self._pair("temporal_n", x)
        x = self._linear("temporal_i", F.layer_norm(x, (width,), weight, bias, _EPSILON))
        framed = x.unflatten(0, (-1, frames)).transpose(1, 2)  # (b, n, f, c)
        q, k, v = (
            self._linear(f"temporal_{name}", framed).unflatten(-1, (self.heads, -1)).transpose(2, 3) for name in "qkv"
        )
        seen = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(-2)
        return self._linear("temporal_o", seen).transpose(1, 2).flatten(0, 1)

    def _given(self, hidden: torch.Tensor) -> torch.Tensor | float:
        """What the given layer adds to each frame, (b f, n, c); 0 if no layer is given."""
        signals, tokens = self.sharing.signals, hidden.shape[1]
        if not signals:
            return 0.0
        if tokens not in self._control:
            made = []
            for f in range(self.sharing.frames):
                first, second = f"control_convs.{f}.0", f"control_convs.{f}.2"
                x = F.conv2d(signals[tokens], *self._pair(first, hidden), padding=1)
                x = F.conv2d(F.silu(x), *self._pair(second, hidden))
                made.append(x.flatten(2).transpose(1, 2))
            self._control[tokens] = torch.cat(made)
        return self._control[tokens].repeat(len(hidden) // self.sharing.frames, 1, 1)
