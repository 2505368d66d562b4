"""Where a pipeline keeps its denoisers, and what tells them apart from one another."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from diffusion_accel.diffusers_compat import repeated_blocks
from diffusion_accel.hooks import compiled_in_place, is_compiled, model_of
from diffusion_accel.module_tree import parts_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

#: components that make images of latents
DECODERS = ("vae", "movq", "vqvae", "vqgan", "decoder")
#: components that denoise; Wan 2.2 has a second transformer for the steps with less noise, Ideogram 4 one for the
#: branch without a prompt
DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer")


def denoiser_names(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    """The components that the pipeline calls to denoise: "unet", else its transformers; most have one, some two."""
    there = [name for name in DENOISERS if isinstance(getattr(pipeline, name, None), nn.Module)]
    return tuple(there[:1] if there[:1] == ["unet"] else there)


def called_denoisers(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The denoisers as the pipeline calls them, compiled or wrapped as they may be: hooks around calls go here."""
    return [getattr(pipeline, name) for name in denoiser_names(pipeline)]


def find_denoisers(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The models that the pipeline calls to denoise: one, or two that share the steps or the branches of guidance."""
    return [model_of(module) for module in called_denoisers(pipeline)]


def denoiser_name(pipeline: DiffusionPipeline) -> str | None:
    """The first of `denoiser_names`, or None."""
    return next(iter(denoiser_names(pipeline)), None)


def find_denoiser(pipeline: DiffusionPipeline) -> nn.Module | None:
    """The first of `find_denoisers`, or None."""
    return next(iter(find_denoisers(pipeline)), None)


def draws_pixels(pipeline: DiffusionPipeline) -> bool:
    """Whether the denoiser works on pixels: the pipeline has none of the components that decode latents."""
    return not any(part in pipeline.components for part in DECODERS)


def find_controlnet(pipeline: DiffusionPipeline) -> nn.Module | None:
    """The ControlNet (or the wrapper around several) that the pipeline runs before its denoiser, as it is called; or
    None."""
    module = getattr(pipeline, "controlnet", None)
    return module if isinstance(module, nn.Module) else None


def models_of_a_call(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The models that one call at a time may use: the denoisers and the ControlNets, without what is around them."""
    controlnet = find_controlnet(pipeline)
    beside = [] if controlnet is None else [model_of(controlnet)]
    beside += [model_of(net) for found in beside for net in getattr(found, "nets", ())]
    return [*find_denoisers(pipeline), *beside]


def closed_inside(pipeline: DiffusionPipeline) -> str | None:
    """Why hooks cannot reach the inside of the pipeline's denoisers; None if they can."""
    for name, module in zip(denoiser_names(pipeline), called_denoisers(pipeline), strict=True):
        model = model_of(module)
        if hasattr(module, "_orig_mod"):
            how, first = "torch.compile", f"pipe.{name} = pipe.{name}._orig_mod; "
        elif compiled_in_place(model):
            how, first = f"{name}.compile()", "load it anew and call "
        elif is_compiled(vars(model).get("forward")):
            how, first = "its forward, torch.compile", f"del pipe.{name}.forward; "
        else:
            continue
        blocks = ", ".join(repeated_blocks(model))
        instead = f"compile its blocks instead ({blocks}): {first}pipe.{name}.compile_repeated_blocks()"
        return (
            f"its {name} is compiled as a whole ({how}), and this works inside of it; "
            f"{instead if blocks else 'use it uncompiled'}"
        )
    return None


def getattr_path(module: nn.Module, name: str) -> Any:
    """The submodule or attribute at a dotted name, or None."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def unwrapped(layer: nn.Module) -> nn.Module:
    """A layer without the LoRA around it (peft keeps the layer itself as `base_layer`)."""
    base = getattr(layer, "base_layer", None)
    return base if isinstance(base, nn.Module) else layer


def fingerprint(*modules: nn.Module) -> str | None:
    """A short hash of the weights and shapes of models: 16 numbers of every parameter, rounded to bfloat16; None where
    some are elsewhere (offloaded).

    The same for a model in float32 and in half precision, except where rounding twice differs from rounding once, and
    for one whose LoRAs were deleted again, which leaves their wrappers around its layers.
    """
    parts = [part for module in modules for part in parts_of(model_of(module))]
    parameters = [parameter for part in parts for parameter in part._parameters.values() if parameter is not None]
    if any(parameter.is_meta for parameter in parameters):
        return None
    with torch.no_grad():
        numbers = _in_bfloat16([_sampled(parameter) for parameter in parameters])
    known = _known.get(modules[0]) if modules else None
    if known is not None and known.numbers == numbers and known.of(parameters):
        return known.found
    found = _digest(modules)
    if modules:
        _known[modules[0]] = _Known(list(map(weakref.ref, parameters)), [p.shape for p in parameters], numbers, found)
    return found


class _Known(NamedTuple):
    """A fingerprint, with the parameters and numbers of which it is: asked in every call, it is seldom another."""

    parameters: list[weakref.ref[nn.Parameter]]
    shapes: list[torch.Size]
    numbers: bytes
    found: str

    def of(self, parameters: list[nn.Parameter]) -> bool:
        """Whether it is of these parameters, and they have the same shapes."""
        same = len(self.parameters) == len(parameters) and all(
            reference() is parameter for reference, parameter in zip(self.parameters, parameters, strict=True)
        )
        return same and self.shapes == [parameter.shape for parameter in parameters]


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()  # by the first of some models


def _digest(modules: Sequence[nn.Module]) -> str:
    digest = hashlib.sha256()
    named = [pair for module in modules for pair in _named(module)]
    with torch.no_grad():
        taken = [_sampled(parameter) for _, parameter in named]
    together, end = _in_bfloat16(taken), 0
    for (name, parameter), part in zip(named, taken, strict=True):
        begin, end = end, end + 2 * len(part)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(together[begin:end])
    return digest.hexdigest()[:16]


def _in_bfloat16(parts: list[torch.Tensor]) -> bytes:
    """Numbers of several tensors one after the other."""
    if not parts:
        return b""
    if len({(part.dtype, part.device) for part in parts}) > 1:
        parts = [part.to(parts[0].device, torch.bfloat16) for part in parts]
    return torch.cat(parts).to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()


def _named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a model by name, sorted, as they are called without a LoRA around their layer."""
    named = model_of(module).named_parameters()
    return sorted(((name.replace(".base_layer.", "."), p) for name, p in named), key=itemgetter(0))


def _sampled(tensor: torch.Tensor) -> torch.Tensor:
    """At most 16 numbers of a tensor, evenly spaced in the order of its elements."""
    count = tensor.numel()
    step = max(1, count // 16)
    if tensor.is_contiguous():
        return tensor.as_strided((min(16, count),), (step,))
    places = torch.arange(0, count, step, device=tensor.device)[:16]
    return tensor[torch.unravel_index(places, tensor.shape)]
