"""IP-Adapters: a pipeline that is shown an image beside the prompt, with one clear line where one does not fit."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import IPAdapterMixin
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.finite import finite
from diffusion_accel.hooks import model_of
from diffusion_accel.io import at_home, printable, shown
from diffusion_accel.model_files.folders import check_component
from diffusion_accel.model_files.headers import check_weights, safetensors_header
from diffusion_accel.model_files.names import ModelSource

from .components import check_keys
from .keywords import components_of
from .loaded import check_loaded, reason_of

ENCODER = "image_encoder"  # a pipeline's component, and the folder beside an IP-Adapter
_PARTS = ("image_proj.", "ip_adapter.")  # of the names in a file
_LAYER = re.compile(r"ip_adapter\.\d+\.to_[kv]_ip\.weight")  # a name of the second part
_OF_FACES = "image_proj.perceiver_resampler.proj_in.weight", "image_proj.norm.weight"  # names where there is no proj


def load_ip_adapter(pipe: Any, file: str | Path, scale: float = 1.0) -> None:
    """Load an IP-Adapter, and the image encoder that lies beside it where the pipeline has none.

    A pipeline that one does not fit stays as it was.

    Args:
        pipe: a pipeline with a U-Net; its calls need an `ip_adapter_image` from now on.
        file: the adapter's `.safetensors` file; a CLIPVisionModelWithProjection is in the folder `image_encoder` beside
            it.
        scale: how much the image counts, 0 to 2.

    Raises:
        ConfigurationError: the file is no path, or the scale out of its limits.
        ModelLoadError: the file is broken, a pickle, or does not fit the model; or there is no image encoder.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale <= 2:
        raise ConfigurationError(f"scale must be at least 0 and at most 2, got {shown(scale)}")
    path = _path(file)
    names = _check_file(path)
    _check_takes_one(type(pipe), pipe.components)
    with _as_it_was(pipe):
        if getattr(pipe, ENCODER) is None:
            pipe.register_modules(**{ENCODER: _encoder(path, pipe.dtype)})
        _check_width(path, names, getattr(pipe, ENCODER).config)
        try:
            with warnings.catch_warnings(), _only_new_modules_cast(pipe.unet):
                warnings.simplefilter("ignore")
                pipe.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None)
        except Exception as error:  # diffusers raises many kinds for weights that do not fit
            absent = [name for name, value in pipe.unet.named_parameters() if value.is_meta]
            why = f"it has no {printable(str(error.args[0]))}" if isinstance(error, KeyError) else reason_of(error)
            why = f"it has nothing for {absent[0]}" if absent else why
            raise ModelLoadError(f"the IP-Adapter {file} does not fit this model: {why}") from error
        _check_all_used(file, names, pipe.unet)
        pipe.set_ip_adapter_scale(scale)


def check_before(source: ModelSource, cls: type | None, file: str | Path) -> None:
    """Refuse an IP-Adapter that cannot work before the model is loaded, as far as files tell.

    Args:
        source: the model.
        cls: its pipeline class; None: that is not known.
        file: the adapter's.

    Raises:
        ConfigurationError, ModelLoadError: see `load_ip_adapter`.
    """
    path = _path(file)
    _check_names(path)
    if cls is not None:
        _check_takes_one(cls, components_of(cls))
    own = (Path(source.location) / ENCODER).is_dir()
    if source.kind in ("embedded", "folder") and not own:
        _encoder_folder(path)


def _path(file: Any) -> Path:
    if not isinstance(file, (str, Path)) or not str(file) or file == Path():
        raise ConfigurationError(f"ip_adapter must be the path of a file, got {shown(file)}")
    return at_home(file)


def _check_takes_one(cls: type, parts: Collection[str]) -> None:
    if not issubclass(cls, IPAdapterMixin) or ENCODER not in parts:
        raise ModelLoadError(f"{cls.__name__} takes no IP-Adapter; pipelines with a U-Net and an image encoder do")


@contextmanager
def _as_it_was(pipe: Any) -> Iterator[None]:
    """Around what puts an adapter on a pipeline: after an error it has what it had before."""
    unet: Any = pipe.unet
    names = ("encoder_hid_proj", "text_encoder_hid_proj")
    parts = {name: getattr(pipe, name) for name in (ENCODER, "feature_extractor") if name in pipe.components}
    modules = {name: getattr(unet, name) for name in names if hasattr(unet, name)}
    kind, processors = getattr(unet.config, "encoder_hid_dim_type", None), unet.attn_processors
    try:
        yield
    except BaseException:
        pipe.register_modules(**parts)
        for name in filter(lambda name: hasattr(unet, name), names):
            setattr(unet, name, modules.get(name))
        unet.config.encoder_hid_dim_type = kind
        unet.set_attn_processor(dict(processors))
        raise


def _check_all_used(file: str | Path, names: dict[str, Any], unet: Any) -> None:
    """Refuse what diffusers leaves out: layers that the model has not, more of an image projection than it knows."""
    used = sum(hasattr(processor, "to_k_ip") for processor in unet.attn_processors.values())
    there = sum(name.endswith(".to_k_ip.weight") for name in names)
    if used != there:
        raise ModelLoadError(f"the IP-Adapter {file} does not fit this model: it is for {there} layers, not {used}")
    numbers = sum(math.prod(entry["shape"]) for name, entry in names.items() if name.startswith(_PARTS[0]))
    taken = sum(one.numel() for one in unet.encoder_hid_proj.image_projection_layers[0].parameters())
    if numbers != taken:
        raise ModelLoadError(
            f"the IP-Adapter {file} is of a kind that diffusers does not know: its image_proj has {numbers} numbers, "
            f"of which {taken} would be used"
        )


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
    return ip_adapters_of(pipe) > 0


def ip_adapters_of(pipe: Any) -> int:
    """How many IP-Adapters a pipeline has; diffusers loads several."""
    unet = getattr(pipe, "unet", None)
    projection = None if unet is None else getattr(model_of(unet), "encoder_hid_proj", None)
    return len(projection.image_projection_layers) if isinstance(projection, MultiIPAdapterImageProjection) else 0


def _check_names(path: Path) -> dict[str, Any]:
    """The header of a file that is an IP-Adapter for images."""
    check_weights(path, allow_pickle=None)
    names = {name: entry for name, entry in safetensors_header(path).items() if name != "__metadata__"}
    if not all(any(name.startswith(part) for name in names) for part in _PARTS):
        raise ModelLoadError(f"{path} is no IP-Adapter: it has no {' and '.join(part[:-1] for part in _PARTS)}")
    if "image_proj.proj.weight" not in names and any(name in names for name in _OF_FACES):
        raise ModelLoadError(f"the IP-Adapter {path} reads features of faces; only those that read an image are taken")
    for name, entry in names.items():
        if not name.startswith(_PARTS[0]) and not _LAYER.fullmatch(name):
            raise ModelLoadError(f"{path} is no IP-Adapter that is known: it has {printable(name)}")
        if "F" not in entry["dtype"] or not entry["shape"]:
            what = f"{entry['dtype']} of the shape {entry['shape']}"
            raise ModelLoadError(
                f"the IP-Adapter {path} is damaged: {printable(name)} is {what}, which weights are not"
            )
    return names


def _check_file(path: Path) -> dict[str, Any]:
    """The header of a file that is an IP-Adapter for images, whole and finite."""
    names = _check_names(path)
    for name, value in load_file(path).items():
        if not finite(value):
            raise ModelLoadError(
                f"the IP-Adapter {path} is damaged: {printable(name)} holds numbers that are not finite"
            )
    return names


def _encoder_folder(path: Path) -> Path:
    folder = path.parent / ENCODER
    if not folder.is_dir():
        raise ModelLoadError(
            f"the IP-Adapter {path} needs an image encoder: the model has none, and there is no folder {ENCODER} "
            "beside it"
        )
    check_component(folder)
    return folder


def _encoder(path: Path, dtype: Any) -> Any:
    folder = _encoder_folder(path)
    check_keys(folder, CLIPVisionModelWithProjection)
    try:
        encoder = CLIPVisionModelWithProjection.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # transformers raises many kinds
        raise ModelLoadError(f"{folder} cannot be loaded: {reason_of(error)}") from error
    check_loaded({ENCODER: encoder}, str(folder))
    return encoder


def _check_width(path: Path, names: dict[str, Any], config: Any) -> None:
    """Refuse an adapter that reads something else than what the image encoder gives."""
    plain, full, plus = (f"image_proj.{name}.weight" for name in ("proj", "proj.0", "proj_in"))
    if plain in names:
        wanted, found = names[plain]["shape"][-1], config.projection_dim
    elif "image_proj.proj.3.weight" in names and full in names:
        wanted, found = names[full]["shape"][-1], config.hidden_size
    elif plus in names:
        wanted, found = names[plus]["shape"][-1], config.hidden_size
    else:
        raise ModelLoadError(f"{path} is no IP-Adapter that is known: its image_proj has no proj and no proj_in")
    if wanted != found:
        raise ModelLoadError(
            f"the IP-Adapter {path} does not fit the image encoder: it reads {wanted} numbers, and gets {found}"
        )
