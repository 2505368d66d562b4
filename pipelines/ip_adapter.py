"""IP-Adapters: a pipeline that is shown an image beside the prompt, with one clear line where one does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import IPAdapterMixin
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

from diffusion_accel.errors import ModelLoadError
from diffusion_accel.finite import finite
from diffusion_accel.hooks import model_of
from diffusion_accel.io import at_home, first_line, printable
from diffusion_accel.model_files.folders import check_component
from diffusion_accel.model_files.headers import check_weights, safetensors_header

from .components import check_keys
from .loaded import check_loaded

ENCODER = "image_encoder"  # a pipeline's component, and the folder beside an IP-Adapter
_PARTS = ("image_proj.", "ip_adapter.")  # of the names in a file


def load_ip_adapter(pipe: Any, file: str, scale: float = 1.0) -> None:
    """Load an IP-Adapter, and the image encoder that lies beside it where the pipeline has none.

    Args:
        pipe: a pipeline with a U-Net; its calls need an `ip_adapter_image` from now on.
        file: the adapter's `.safetensors` file; a CLIPVisionModelWithProjection is in the folder `image_encoder` beside
            it.
        scale: how much the image counts.

    Raises:
        ModelLoadError: the file is broken, a pickle, or does not fit the model; or there is no image encoder.
    """
    path = at_home(file)
    names = _check_file(path)
    if not isinstance(pipe, IPAdapterMixin) or ENCODER not in pipe.components:
        raise ModelLoadError(
            f"{type(pipe).__name__} takes no IP-Adapter; pipelines with a U-Net and an image encoder do"
        )
    if getattr(pipe, ENCODER) is None:
        pipe.register_modules(**{ENCODER: _encoder(path, pipe.dtype)})
    _check_width(path, names, getattr(pipe, ENCODER).config)
    try:
        with warnings.catch_warnings(), _only_new_modules_cast(pipe.unet):
            warnings.simplefilter("ignore")
            pipe.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None)
    except Exception as error:  # diffusers raises many kinds for weights that do not fit
        absent = [name for name, value in pipe.unet.named_parameters() if value.is_meta]
        why = f"it has no {printable(str(error.args[0]))}" if isinstance(error, KeyError) else first_line(error)
        why = f"it has nothing for {absent[0]}" if absent else why
        raise ModelLoadError(f"the IP-Adapter {file} does not fit this model: {why}") from error
    used = sum(hasattr(processor, "to_k_ip") for processor in pipe.unet.attn_processors.values())
    there = sum(name.endswith(".to_k_ip.weight") for name in names)
    if used != there:  # diffusers leaves out what it has no layer for
        raise ModelLoadError(f"the IP-Adapter {file} does not fit this model: it is for {there} layers, not {used}")
    pipe.set_ip_adapter_scale(scale)


@contextmanager
def _only_new_modules_cast(unet: Any) -> Iterator[None]:
    """While diffusers puts an adapter on a U-Net: of a quantized one, which cannot be cast, only what is new is."""
    if not getattr(unet, "is_quantized", False):
        yield
        return
    unet.to = lambda **_: unet
    try:
        yield
    finally:
        del unet.to
    for module in (unet.encoder_hid_proj, *unet.attn_processors.values()):
        if isinstance(module, torch.nn.Module):
            module.to(dtype=unet.dtype, device=unet.device)


def has_ip_adapter(pipe: Any) -> bool:
    """Whether a pipeline's calls need an `ip_adapter_image`."""
    unet = getattr(pipe, "unet", None)
    projection = None if unet is None else getattr(model_of(unet), "encoder_hid_proj", None)
    return isinstance(projection, MultiIPAdapterImageProjection)


def _check_file(path: Path) -> dict[str, Any]:
    """The header of a file that is an IP-Adapter for images, whole and finite."""
    check_weights(path, allow_pickle=None)
    names = {name: entry for name, entry in safetensors_header(path).items() if name != "__metadata__"}
    if not all(any(name.startswith(part) for name in names) for part in _PARTS):
        raise ModelLoadError(f"{path} is no IP-Adapter: it has no {' and '.join(part[:-1] for part in _PARTS)}")
    for name, value in load_file(path).items():
        if not finite(value):
            raise ModelLoadError(
                f"the IP-Adapter {path} is damaged: {printable(name)} holds numbers that are not finite"
            )
    return names


def _encoder(path: Path, dtype: Any) -> Any:
    folder = path.parent / ENCODER
    if not folder.is_dir():
        raise ModelLoadError(
            f"the IP-Adapter {path} needs an image encoder: the model has none, and there is no folder {ENCODER} "
            "beside it"
        )
    check_component(folder)
    check_keys(folder, CLIPVisionModelWithProjection)
    try:
        encoder = CLIPVisionModelWithProjection.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # transformers raises many kinds
        raise ModelLoadError(f"{folder} cannot be loaded: {first_line(error)}") from error
    check_loaded({ENCODER: encoder}, str(folder))
    return encoder


def _check_width(path: Path, names: dict[str, Any], config: Any) -> None:
    """Refuse an adapter that reads something else than what the image encoder gives."""
    of_face = "image_proj.perceiver_resampler.proj_in.weight", "image_proj.norm.weight"
    plain, full, plus = (f"image_proj.{name}.weight" for name in ("proj", "proj.0", "proj_in"))
    if plain in names:
        wanted, found = names[plain]["shape"][-1], config.projection_dim
    elif "image_proj.proj.3.weight" in names and full in names:
        wanted, found = names[full]["shape"][-1], config.hidden_size
    elif any(name in names for name in of_face):
        raise ModelLoadError(f"the IP-Adapter {path} reads features of faces; only those that read an image are taken")
    elif plus in names:
        wanted, found = names[plus]["shape"][-1], config.hidden_size
    else:
        raise ModelLoadError(f"{path} is no IP-Adapter that is known: its image_proj has no proj and no proj_in")
    if wanted != found:
        raise ModelLoadError(
            f"the IP-Adapter {path} does not fit the image encoder: it reads {wanted} numbers, and gets {found}"
        )
