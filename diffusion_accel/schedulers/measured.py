"""What a learned solver was measured with, and whether a call is like that.

`made_for` in its configuration is a record; of it are read "denoiser" (a class's name), "weights" (a fingerprint, see
`denoisers.fingerprint`), "guidance_scale" and "strength" ([lowest, highest]) and "height_width" ([[96, 96], …]).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusion_accel.denoisers import find_denoisers, fingerprint, scale_argument
from diffusion_accel.io import plain

from .solver import CLASS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def describe(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What a solver is made for: the class of the denoisers, and their weights (None where they are elsewhere)."""
    denoisers = find_denoisers(pipe)
    return {
        "denoiser": "+".join(type(denoiser).__name__ for denoiser in denoisers),
        "weights": fingerprint(*denoisers),
    }


def unmeasured(pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> str | None:
    """How a call differs from what the pipeline's learned solver was measured with; None if it does not.

    Args:
        pipe: the pipeline; with another scheduler there is nothing to say.
        arguments: of the call, by name.
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    made_for = scheduler.config.get("made_for") if type(scheduler).__name__ == CLASS else None
    if not isinstance(made_for, dict) or not made_for:
        return None
    found = [_other_model(pipe, made_for)]
    name = scale_argument(pipe, arguments)
    found.append(_outside(name, arguments.get(name), made_for.get("guidance_scale")))
    found.append(_outside("strength", arguments.get("strength"), made_for.get("strength")))
    found.append(_other_size(arguments, made_for.get("height_width")))
    said = [text for text in found if text]
    return f"the learned solver was not measured with {', nor with '.join(said)}" if said else None


def _other_model(pipe: DiffusionPipeline, made_for: dict[str, Any]) -> str | None:
    here = describe(pipe)
    known = made_for.get("denoiser")
    if isinstance(known, str) and known != here["denoiser"]:
        return f"a {here['denoiser']} (it was made for {plain(known)})"
    weights = made_for.get("weights")
    if isinstance(weights, str) and here["weights"] not in (None, weights):
        return "these weights (another model, a LoRA or quantized layers)"
    return None


def _outside(name: str, value: object, limits: object) -> str | None:
    match limits:
        case [int() | float() as low, int() | float() as high] if isinstance(value, (int, float)):
            return None if low <= value <= high else f"{name} {value:g} (from {low:g} to {high:g} it was)"
    return None


def _other_size(arguments: Mapping[str, Any], sizes: object) -> str | None:
    size = [arguments.get("height"), arguments.get("width")]
    if not isinstance(sizes, (list, tuple)) or not sizes or None in size:
        return None
    if size in [list(known) for known in sizes if isinstance(known, (list, tuple))]:
        return None
    return f"{size[1]}x{size[0]} pixels"
