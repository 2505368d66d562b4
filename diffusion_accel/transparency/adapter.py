"""What makes a base model draw transparent latents: changes of its weights, in place while a call runs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks import ModelHook
from torch import nn

from diffusion_accel.denoisers import getattr_path
from diffusion_accel.diffusers_compat import has_offload_hook, is_offloaded
from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.hooks import HookSet
from diffusion_accel.io import printable
from diffusion_accel.snapshot import Snapshot

from .ldm_keys import from_ldm

_LOW_RANK = {  # suffix of a file's key -> (which factor, what follows the module's name)
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
}
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.")
_FORGE = re.compile(r"(.+)::(lora|diff)::(\d{1,3})")


@dataclass
class Change:
    """A change of one parameter: a whole difference, or two factors whose product it is."""

    full: torch.Tensor | None = None
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    alpha: torch.Tensor | None = None  # a number

    @property
    def scale(self) -> float:
        """alpha / rank, 1 without an alpha."""
        return 1.0 if self.alpha is None or self.down is None else float(self.alpha) / self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter that it changes."""
        if self.full is not None:
            return tuple(self.full.shape)
        assert self.up is not None and self.down is not None
        return (self.up.shape[0], *self.down.shape[1:])

    def impossible(self) -> str | None:
        """Why this cannot be a change, or None."""
        factors = [one for one in (self.up, self.down) if one is not None]
        if self.full is not None:
            return "is changed as a whole and by low-rank factors" if factors or self.alpha is not None else None
        if self.up is None or self.down is None:
            return "has only one of its two low-rank factors"
        if min(one.dim() for one in factors) < 2 or not self.up.numel() or not self.down.numel():
            return "has low-rank factors that are no matrices"
        if self.up.flatten(1).shape[1] != self.down.shape[0]:
            return f"has low-rank factors of the ranks {self.up.flatten(1).shape[1]} and {self.down.shape[0]}"
        if self.alpha is not None and self.alpha.numel() != 1:
            return "has an alpha that is no number"
        return None

    def difference(self, device: torch.device) -> torch.Tensor:
        """What is added to the parameter, float32."""
        if self.full is not None:
            return self.full.to(device, torch.float32)
        assert self.up is not None and self.down is not None
        up, down = (x.to(device, torch.float32) for x in (self.up.flatten(1), self.down.flatten(1)))
        return (up @ down).view(self.shape) * self.scale


Changes = dict[str, Change]


def read_changes(file: Path, tensors: dict[str, torch.Tensor]) -> Changes:
    """The changes that an adapter file with these tensors makes, by the parameter's name in diffusers' layout.

    Understood are: differences under the parameters' own names, low-rank factors (`lora_A`/`lora_B`, `lora.down`/
    `lora.up`, with `alpha`), and the web UI's `<LDM name>::diff::0`, `::lora::0` (up) and `::lora::1` (down).

    Raises:
        ModelLoadError: a key is none of these, or a factor is missing.
    """
    found: Changes = {}
    for key, value in tensors.items():
        name = next((key[len(p) :] for p in _PREFIXES if key.startswith(p)), key)
        forge = _FORGE.fullmatch(name)
        if forge:
            plain = from_ldm(forge[1]) or forge[1]
            part = "full" if forge[2] == "diff" else ("up", "down")[int(forge[3])] if int(forge[3]) < 2 else None
        else:
            suffix = next((s for s in _LOW_RANK if name.endswith(s)), None)
            plain, part = (f"{name.removesuffix(suffix)}.weight", _LOW_RANK[suffix]) if suffix else (name, "full")
            if name.endswith(".alpha"):
                plain, part = f"{name.removesuffix('.alpha')}.weight", "alpha"
            elif not suffix:
                plain = from_ldm(name) or name
        if part is None:
            raise ModelLoadError(f"{file}: {printable(key)} is nothing an adapter of latent transparency can hold")
        change = found.setdefault(plain, Change())
        if getattr(change, part) is not None:
            raise ModelLoadError(f"{file} changes {printable(plain)} twice")
        setattr(change, part, value)
    for name, change in found.items():
        reason = change.impossible()
        if reason:
            raise ModelLoadError(f"{file}: {printable(name)} {reason}")
    return found


def _base(module: Any) -> Any:
    """The layer itself where peft has put a LoRA around it."""
    return getattr(module, "base_layer", module)


def _owner(unet: nn.Module, name: str) -> tuple[Any, str]:
    path, _, leaf = name.rpartition(".")
    return _base(getattr_path(unet, path)), leaf


def check_changes(
    changes: Iterable[tuple[str, tuple[int, ...]]], unet: nn.Module, file: Path, inputs: int | None = None
) -> None:
    """Raise `ModelLoadError` unless every change fits a parameter of `unet`; `conv_in` may take more or fewer
    channels: `inputs`, if that is known."""
    shapes = {n.replace(".base_layer.", "."): tuple(p.shape) for n, p in unet.named_parameters()}
    for name, shape in changes:
        known = shapes.get(name)
        if known is None:
            try:
                module, leaf = _owner(unet, name)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                module, leaf = None, ""
            known = _shape_of(module, leaf) if isinstance(module, nn.Module) else None
            if known is None:
                raise ModelLoadError(
                    f"{file.name} changes {printable(name)}, which this {type(unet).__name__} does not have: "
                    "it is for another family of models"
                )
        wider = name == "conv_in.weight" and len(shape) == 4 and shape[0] == known[0] and shape[2:] == known[2:]
        wider = wider and (inputs is None or shape[1] == inputs)
        if shape != known and not wider:
            raise ModelLoadError(
                f"{file.name} changes {name} of shape {shape}, this {type(unet).__name__} has {known}: "
                "it is for another family of models"
            )


def _shape_of(module: Any, leaf: str) -> tuple[int, ...] | None:
    """The shape that a layer's parameter stands for, also where it is packed; None if that is not known."""
    if leaf == "weight" and hasattr(module, "in_features"):
        return (module.out_features, module.in_features)
    if leaf == "weight" and hasattr(module, "in_channels"):
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return None


class Adapter:
    """Changes in force on a U-Net between `apply` and `restore`.

    A plain floating-point parameter is replaced by a changed copy, which costs nothing at a step; afterwards the very
    same parameter object is back. Layers without one (quantized, or offloaded layer by layer) get a hook that adds what
    the change makes of their input. Changed copies stay for the next time, unless the model is offloaded or changes.
    """

    def __init__(self, changes: Changes) -> None:
        self.changes = changes
        self._made: dict[str, nn.Parameter] = {}  # changed copies
        self._made_of: tuple[float, Snapshot] | None = None  # strength and base model
        self._offloaded = False
        self._kept: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._hooks = HookSet("diffusion_accel.transparency.adapter")

    @property
    def active(self) -> bool:
        """Whether the changes are in force."""
        return bool(self._kept or len(self._hooks))

    @torch.no_grad()
    def apply(self, unet: nn.Module, strength: float = 1.0) -> None:
        """Put the changes in force, times `strength`."""
        hooked: dict[int, tuple[Any, dict[str, torch.Tensor | Change]]] = {}
        if self._made_of is None or self._made_of[0] != strength or not self._made_of[1].holds():
            self._made, self._made_of = {}, (strength, Snapshot(unet, hooks=False))
        self._offloaded = has_offload_hook(unet)
        try:
            for name, change in self.changes.items():
                module, leaf = _owner(unet, name)
                parameter = module._parameters.get(leaf)
                if _is_plain(module, parameter):
                    assert parameter is not None
                    if name not in self._made:
                        self._made[name] = _changed(parameter, change, strength)
                    self._kept.append((module, leaf, parameter))
                    module._parameters[leaf] = self._made[name]
                elif leaf in ("weight", "bias") and _shape_of(module, "weight") is not None:
                    hooked.setdefault(id(module), (module, {}))[1][leaf] = change
                else:
                    raise ConfigurationError(
                        f"transparent: {name} cannot be changed where it is ({type(module).__name__}); "
                        "use model offload instead of sequential offload"
                    )
            for module, changes in hooked.values():
                self._hooks.add(module, _Added(module, changes, strength), innermost=True)  # it is the layer's own
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Give the U-Net its own parameters back. Safe to call twice."""
        while self._kept:
            module, leaf, parameter = self._kept[-1]
            module._parameters[leaf] = parameter
            self._kept.pop()  # only now: an interrupt must not lose it
        if self._offloaded:
            self._made, self._made_of = {}, None
        self._hooks.remove()


def _changed(parameter: nn.Parameter, change: Change, strength: float) -> nn.Parameter:
    """A changed copy of a parameter, in its type and layout."""
    base, merged = _equally_wide(parameter.data.float(), change.difference(parameter.device) * strength)
    made = (base + merged).to(parameter.dtype)
    if made.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        made = made.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(made, requires_grad=False)


def _equally_wide(base: torch.Tensor, change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with the larger number of input channels, further ones zero: given layers widen the first convolution, and
    inpainting models have a wider one."""
    missing = change.shape[1] - base.shape[1] if change.dim() == 4 else 0
    if missing > 0:
        base = F.pad(base, (0, 0, 0, 0, 0, missing))
    elif missing < 0:
        change = F.pad(change, (0, 0, 0, 0, 0, -missing))
    return base, change


def _is_plain(module: Any, parameter: Any) -> bool:
    """Whether a parameter is an ordinary tensor that stays where it is."""
    return (
        type(parameter) is nn.Parameter
        and type(parameter.data) is torch.Tensor
        and parameter.is_floating_point()
        and parameter.device.type != "meta"
        and not is_offloaded(module)
    )


class _Added(ModelHook):
    """Adds what a change of weight and bias makes of a layer's input."""

    def __init__(self, module: Any, changes: dict[str, Any], strength: float) -> None:
        super().__init__()
        self.weight: Change | None = changes.get("weight")
        self.bias: Change | None = changes.get("bias")
        self.strength = strength
        self.convolution = hasattr(module, "kernel_size")
        self._factors: tuple[Any, tuple[Any, Any, Any]] | None = None

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        x = next(iter((*args, *kwargs.values())))
        made = self.fn_ref.original_forward(*args, **kwargs)
        if self._factors is None or self._factors[0] != (made.device, made.dtype):
            self._factors = (made.device, made.dtype), self._prepared(made)
        down, up, bias = self._factors[1]
        if up is None:
            return made + bias.view(-1, *(1,) * (made.dim() - 2)) if self.convolution else made + bias
        x = x.to(made.dtype)
        if not self.convolution:
            return made + F.linear(x if down is None else F.linear(x, down), up, bias)
        # as it is now: a part of an image is padded on fewer sides
        geometry = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        if down is None:
            return made + F.conv2d(x, up, bias, **geometry)
        return made + F.conv2d(F.conv2d(x, down, **geometry), up, bias)

    def _prepared(self, like: torch.Tensor) -> tuple[Any, Any, Any]:
        """The factors of the weight's change, the second alone if it is a whole one, and the bias's; all scaled."""
        down: torch.Tensor | None = None
        up: torch.Tensor | None = None
        bias = None if self.bias is None else (self.bias.difference(like.device) * self.strength).to(like)
        change = self.weight
        if change is not None and (change.down is None or change.up is None):
            up = change.difference(like.device).to(like) * self.strength
        elif change is not None:
            assert change.down is not None and change.up is not None
            down, up = change.down.to(like), change.up.to(like).flatten(1) * (change.scale * self.strength)
            down, up = (down, up[..., None, None]) if self.convolution else (down.flatten(1), up)
        return down, up, bias
