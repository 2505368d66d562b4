"""Images in the middle of their drawing: what the latents of a step would be without their noise, decoded."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from diffusion_accel.changes import Changes
from diffusion_accel.diffusers_compat import announced_steps, unpacked_latents
from diffusion_accel.hooks import bind_bound
from diffusion_accel.io import first_line
from diffusion_accel.prediction import Conversion, model_input
from diffusion_accel.sizes import side_to_ask_for
from diffusion_accel.steps import WatchedStep

if TYPE_CHECKING:
    from PIL import Image

MOST = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Partial:
    """Images of a request before they are finished.

    Attributes:
        index: which of the partial images that were asked for, 0, 1, …
        step, steps: after how many steps of how many it was made.
        images: as those of the end, with alpha where the request is transparent.
    """

    index: int
    step: int
    steps: int
    images: list[Image.Image]


def impossible(scheduler: Any, pipe: Any) -> str | None:
    """Why a pipeline with this scheduler shows nothing before the end, as far as that can be seen; None if it does."""
    if scheduler is None or not Conversion(scheduler).possible:
        return f"what {type(scheduler).__name__} is given does not say what the image will be"
    if not hasattr(getattr(pipe, "vae", None), "decode") or not hasattr(pipe, "image_processor"):
        return "it has no VAE and image processor that make an image of latents"
    return None


def steps_of(count: int, steps: int) -> list[int]:
    """Behind which steps so many partial images are made: evenly, none at the start, none at the end."""
    return sorted({round(steps * (k + 1) / (count + 1)) for k in range(count)} & set(range(1, steps)))


def steps_in_all(pipe: Any) -> int:
    """How many steps the call of a pipeline has that runs: as many as it announced, else its scheduler's timesteps."""
    announced = announced_steps(pipe)
    return announced if isinstance(announced, int) else len(pipe.scheduler.timesteps)


def clean(scheduler: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What the prediction says of the latents without noise.

    Args:
        scheduler: before its step.
        step: the step, which has arguments `model_output`, `timestep` and `sample` (B, C, H, W) or (B, S, C).
        args, kwargs: what it is called with.
    """
    named = bind_bound(step, args, dict(kwargs))
    x = model_input(scheduler, named["sample"], named["timestep"])
    value = Conversion(scheduler).to("sample", named["model_output"], x, float(named["timestep"]))
    return value if value.dim() != 4 else value[:, : named["sample"].shape[1]]


@contextmanager
def shown_on_the_way(
    pipe: Any, every: int, size: tuple[int | None, int | None], show: Callable[[Partial], object]
) -> Iterator[None]:
    """Around a call of a pipeline: show its images before they are finished, which leaves what it draws as it is.

    Args:
        pipe: an accelerated pipeline for which nothing is `impossible`.
        every: after so many steps, and as many again; not after the last one.
        size: height and width of the images in pixels, as in `decoded`.
        show: called with them. Where they cannot be made after all, that is a warning, once.
    """
    done, failed = 0, False

    def around(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal done, failed
        steps = steps_in_all(pipe)
        done += 1
        latents = None
        if not failed and done % every == 0 and done < steps:
            latents = clean(pipe.scheduler, step, args, kwargs)
        output = step(*args, **kwargs)
        if latents is not None:
            try:
                images = decoded(pipe, latents, *size, functools.partial(_decode, pipe))
            except (ValueError, RuntimeError) as error:
                failed = True
                logger.warning("there are no images before the last step: %s", first_line(error))
            else:
                show(Partial(done // every - 1, done, steps, images))
        return output

    with Changes() as changes:
        changes.set(pipe.scheduler, "step", WatchedStep(pipe.scheduler, pipe.scheduler.step, around))
        yield


@torch.no_grad()
def _decode(pipe: Any, z: torch.Tensor) -> Any:
    return pipe.vae.decode(z.to(pipe.vae.dtype), return_dict=False)[0]


def decoded(
    pipe: Any, latents: torch.Tensor, height: int | None, width: int | None, decode: Callable[[torch.Tensor], Any]
) -> list[Image.Image]:
    """Latents as the pipeline's images.

    Args:
        pipe: an accelerated pipeline whose call runs.
        latents: as its scheduler has them.
        height, width: of the images in pixels, for latents that are packed; None: the pipeline's usual ones.
        decode: of the VAE: latents -> (B, 3, H, W) in -1 to 1.
    """
    side = side_to_ask_for(pipe)
    z = latents if latents.dim() == 4 else unpacked_latents(pipe, latents, height or side, width or side)
    config = pipe.vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scaling, shift = getattr(config, "scaling_factor", None) or 1.0, getattr(config, "shift_factor", None) or 0.0
    if mean is not None and std is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(z) for values in (mean, std))
        z = z * std / scaling + mean
    else:
        z = z / scaling + shift
    made = decode(z)
    images = pipe.image_processor.postprocess(made, output_type="pil")
    return pipe.acceleration.preview(images, z, made)
