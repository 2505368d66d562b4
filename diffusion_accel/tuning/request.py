"""What a search is asked for: prompts and calls, checked before anything is drawn, and which of them measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffusion_accel.arguments import refuse_unknown
from diffusion_accel.conditioning import call_parameters
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown
from diffusion_accel.measure.request import MAX_SEED, listed, options_of, whole
from diffusion_accel.measure.sampler import Sampler

from .together import Together

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LEAST = 6  # prompts
CHOSEN = (  # arguments of calls that are not the user's
    "prompt class_labels batch_size num_images_per_prompt num_inference_steps generator latents prompt_embeds "
    "output_type return_dict"
).split()
ENOUGH = 9  # held-out images for a floor


def checked(
    function: Callable[..., Any],
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    named: dict[str, Any],
    options: dict[str, Any],
    seed: int,
    batch: int,
    seconds: float,
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The prompts, and all arguments of the pipeline's calls.

    Args:
        function: what was called; its own arguments are offered where another one is mistyped.
        pipe: the pipeline.
        prompts: at least 6.
        named: arguments of the pipeline's calls that the function names, None where they are not given.
        options: further ones.
        seed: of the first image.
        batch: images in a call.
        seconds: the time budget.

    Raises:
        ConfigurationError: one of them is impossible.
    """
    texts = tuple(listed(prompts))
    own = [name for name in function.__annotations__ if name not in ("pipe", "options", "return")]
    refuse_unknown(options, {*call_parameters(pipe), *own}, f"{function.__name__}()")
    if taken := [name for name in options if name in CHOSEN]:
        raise ConfigurationError(
            f"{function.__name__}() draws an image for each prompt, with steps and seed, and so says "
            f"{', '.join(taken)} itself; leave it out"
        )
    if len(texts) < LEAST:
        raise ConfigurationError(
            f"tuning needs at least {LEAST} prompts (24 or more are recommended), got {len(texts)}"
        )
    scales = named.get("guidance_scale")
    if isinstance(scales, (list, tuple)) and not scales:
        raise ConfigurationError("guidance_scale must be a number or several, got none")
    for scale in scales if isinstance(scales, (list, tuple)) else [scales]:
        one = named | {"guidance_scale": scale}
        options_of(pipe, **{name: value for name, value in one.items() if name in call_parameters(pipe)})
    whole("seed", seed, 0, MAX_SEED), whole("batch", batch)
    if type(seconds) not in (int, float) or not seconds >= 0:
        raise ConfigurationError(f"seconds must be a number of at least 0, got {shown(seconds)}")
    return texts, options | {name: value for name, value in named.items() if value is not None}


def held_out(prompts: int) -> int:
    """How many of so many prompts measure and do not calibrate: a third, or what a floor needs of 20 and more."""
    return max(prompts - 2 * prompts // 3, ENOUGH if prompts >= 20 else 0)


def parts(everything: Sampler, together: Together) -> tuple[Sampler, Sampler]:
    """The images of this process that calibrate, and those that measure.

    Args:
        everything: all images; with several guidance scales in its options each is that of as many.
        together: the processes.

    Raises:
        ConfigurationError: the processes were asked for different things, or there are more scales than images.
    """
    count = len(everything.prompts)
    calibration = count - held_out(count)
    asked = {"prompts": everything.prompts, "steps": everything.steps, "seed": everything.seed}
    together.check(calibration, asked | {"arguments": everything.options})
    if isinstance(scales := everything.options.get("guidance_scale"), (list, tuple)):
        half = calibration // 2  # by the images of one half another half is judged: both have all scales
        if len(scales) > min(half, count - calibration):
            raise ConfigurationError(f"{len(scales)} guidance scales are too many for {count} prompts; give more")
        rest = {name: value for name, value in everything.options.items() if name != "guidance_scale"}
        own = [s for n in (half, calibration - half, count - calibration) for s in _in_blocks(scales, n)]
        everything = replace(everything, options=rest, scales=tuple(own))
    return together.part(everything.part(0, calibration)), together.part(everything.part(calibration, count))


def _in_blocks(scales: Sequence[float], count: int) -> list[float]:
    """A scale for each of so many images, the same ones beside each other, since they share calls."""
    return [float(scales[i * len(scales) // count]) for i in range(count)]
