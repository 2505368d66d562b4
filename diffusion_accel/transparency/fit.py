"""Which pipelines latent transparency can work on, asked before anything is changed."""

from __future__ import annotations

import dataclasses
import inspect
from types import CodeType
from typing import TYPE_CHECKING

from diffusers import AsymmetricAutoencoderKL, AutoencoderKL
from diffusers.utils import BaseOutput

from diffusion_accel.denoisers import find_controlnet, find_denoisers
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.hooks import model_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

IMAGES = ("image", "image_reference", "gligen_inpaint_image")  # arguments that a VAE may encode


def output_fields(pipeline: DiffusionPipeline) -> set[str] | None:
    """What a call of this pipeline returns, as the names of the fields of its output class ("images", "frames", …).

    It is read off the code of `__call__`: the output classes that are named there. None: none is named.
    """
    for cls in type(pipeline).__mro__:
        if "__call__" not in cls.__dict__:
            continue
        function = inspect.unwrap(cls.__dict__["__call__"])
        if not hasattr(function, "__code__"):
            continue
        named = (function.__globals__.get(name) for name in _names(function.__code__))
        outputs = [one for one in named if inspect.isclass(one) and issubclass(one, BaseOutput)]
        if outputs:
            return {field.name for one in outputs if dataclasses.is_dataclass(one) for field in dataclasses.fields(one)}
    return None


def _names(code: CodeType) -> set[str]:
    """Names that a function and the functions inside it look up."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def check_pipeline(pipeline: DiffusionPipeline) -> int:
    """Pixels on a side of one latent. Raises `ConfigurationError`, in one sentence, if RGBA cannot come out."""
    vae = getattr(pipeline, "vae", None)
    if vae is None or "latent_channels" not in getattr(vae, "config", {}):
        raise ConfigurationError("the pipeline has no VAE with latents")
    denoisers = len(find_denoisers(pipeline))
    if denoisers != 1:
        have = "two denoisers, and the weights adapt one" if denoisers else "no unet or transformer"
        raise ConfigurationError(f"the pipeline has {have}")
    fields = output_fields(pipeline)
    if fields is None or "images" not in fields:
        made = f"it returns {', '.join(sorted(fields))}" if fields else "what it returns is not known"
        raise ConfigurationError(f"{made}; latent transparency is for pipelines that return images")
    if "TextToVideo" in type(pipeline).__name__:
        raise ConfigurationError("its images are frames of a video; latent transparency draws single images")
    if not isinstance(model_of(vae), (AutoencoderKL, AsymmetricAutoencoderKL)):
        raise ConfigurationError(
            f"its VAE is {type(model_of(vae)).__name__}, and transparency is read from the latents and images of an "
            "AutoencoderKL; give the pipeline the AutoencoderKL that its model was trained with"
        )
    channels = {vae.config.get(key, 3) for key in ("in_channels", "out_channels")}
    if channels != {3}:
        raise ConfigurationError(f"its VAE makes {max(channels)} channels, not the three of an RGB image")
    return 1 << (len(vae.config.block_out_channels) - 1)


def read_by_vae(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    """Which arguments of a call are images that the VAE may read; what guides a ControlNet or an adapter is none."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    guided = find_controlnet(pipeline) is not None or getattr(pipeline, "adapter", None) is not None
    guides = guided and "control_image" not in parameters and "strength" not in parameters
    return tuple(name for name in IMAGES if name in parameters and not (guides and name == "image"))
