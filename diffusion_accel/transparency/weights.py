"""Reading the weights of latent transparency: networks, adapters, and whether they are what they should be."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusion_accel import io
from diffusion_accel.denoisers import find_denoiser
from diffusion_accel.errors import ModelLoadError
from diffusion_accel.model_files import tensors
from diffusion_accel.model_files.names import safetensors_header

from .adapter import Adapter, check_changes, read_changes
from .attention_sharing import Sharing, is_sharing
from .files import find_parts
from .fit import check_pipeline
from .latent_transparency import CONDITIONS, LAYERS, LatentTransparency
from .modules import LatentTransparencyDecoder, LatentTransparencyEncoder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DIGESTS = "digests.json"
LARGEST = 65504.0  # of a weight, in amount: what half precision holds
_WHOLE, _NUMBER = (int,), (int, float)
LIMITS: dict[str, tuple[tuple[type, ...], float, float]] = {  # of a configuration: kinds, smallest, largest
    "in_channels": (_WHOLE, 3, 3),
    "out_channels": (_WHOLE, 4, 4),
    "latent_channels": (_WHOLE, 1, 1024),
    "block_out_channels": (_WHOLE, 1, 8192),
    "latent_level": (_WHOLE, 1, 11),
    "attention_levels": (_WHOLE, 0, 12),
    "layers_per_block": (_WHOLE, 1, 16),
    "attention_head_dim": (_WHOLE, 1, 8192),
    "norm_num_groups": (_WHOLE, 1, 8192),
    "norm_eps": (_NUMBER, 1e-12, 1.0),
    "recommended_views": (_WHOLE, 0, 8),
    "recommended_refinement": (_WHOLE, 0, 1000),
    "offset_scale": (_NUMBER, -1e4, 1e4),
}


@dataclass
class TransparencyWeights:
    """Everything that a setting needs: networks on the CPU, changes of the base model, sides to decode from, and steps
    that refine given latents."""

    encoder: LatentTransparencyEncoder | None
    decoder: LatentTransparencyDecoder | None
    adapter: Adapter | None
    sharing: Sharing | None
    views: int = 0
    refine: int = 0


def load_weights(
    feature: LatentTransparency, pipeline: DiffusionPipeline, headers: bool = False
) -> TransparencyWeights:
    """Read and check the weights of `feature` for `pipeline`; with `headers` only names and shapes are read.

    Raises:
        ModelLoadError, ConfigurationError: they do not exist or do not fit; in one sentence.
    """
    factor = check_pipeline(pipeline)
    unet: Any = find_denoiser(pipeline)
    channels = pipeline.vae.config.latent_channels
    parts = find_parts(pipeline, feature.weights, feature.variant, feature.adapter)
    if parts.decoder is not None and parts.decoder.is_dir() and not headers:
        check_digests(parts.decoder.parent)
    encoder: Any = None
    decoder: Any = None
    if feature.views != 0 and parts.decoder is not None:
        decoder = load_part(parts.decoder, LatentTransparencyDecoder, headers).to(memory_format=torch.channels_last)
    if parts.encoder is not None:
        scale = {} if parts.offset_scale is None else {"offset_scale": parts.offset_scale}
        encoder = load_part(parts.encoder, LatentTransparencyEncoder, headers, **scale)
    for part, path in ((encoder, parts.encoder), (decoder, parts.decoder)):
        if part is not None and (part.config.latent_channels, part.factor) != (channels, factor):
            raise ModelLoadError(
                f"{path} is for latents of {part.config.latent_channels} channels and 1/{part.factor} of the "
                f"images' sides, this VAE has {channels} and 1/{factor}"
            )
    adapter, sharing = None, None
    if feature.strength and parts.adapter is not None:
        tensors = read_weights(parts.adapter, headers)
        if is_sharing(tensors):
            sharing = Sharing(parts.adapter, tensors, unet, len(LAYERS[feature.variant]))
        else:
            changes = read_changes(parts.adapter, tensors)
            inputs = channels * (1 + len(CONDITIONS[feature.variant]))
            check_changes(((name, change.shape) for name, change in changes.items()), unet, parts.adapter, inputs)
            adapter = Adapter(changes)
    views, refine = feature.views, feature.refine
    if views is None:
        views = 0 if decoder is None else decoder.config.recommended_views
    if refine is None:
        refine = 0 if encoder is None else encoder.config.recommended_refinement
    return TransparencyWeights(encoder, decoder, adapter, sharing, views, refine if decoder is not None else 0)


# ------------------------------------------------------------------------------------------- files
def kind_of(names: Iterable[str]) -> str:
    """What a safetensors file holds, by its keys, in words."""
    names = list(names)
    if "latent_conv_in.weight" in names:
        return "a transparent decoder"
    if is_sharing(names):
        return "attention-sharing modules for SD 1.5"
    if "blocks.0.weight" in names:
        return "a transparency encoder"
    if any("::" in name or "lora" in name or name.startswith(("down_blocks.", "conv_in.")) for name in names):
        return "an adapter of a base model"
    return "something else"


def read_weights(file: Path, headers: bool = False) -> dict[str, torch.Tensor]:
    """The weights in a safetensors file; with `headers` without their values, on the meta device.

    Raises:
        ModelLoadError: the file is broken, or holds something that no weight can be.
    """
    if file.is_file():
        safetensors_header(file)  # says what is wrong with the length
    found = tensors.read_tensors(file, error=ModelLoadError, headers=headers)
    tensors.check_values(found, file, ModelLoadError, LARGEST)
    return found


def check_digests(folder: Path) -> None:
    """Raise `ModelLoadError` unless the files of a folder are those that its list of digests names, if it has one."""
    if not (folder / DIGESTS).exists():
        return  # published files, and folders made by hand, have none
    known = io.read_json(folder / DIGESTS, error=ModelLoadError, limit=2**20)
    if not isinstance(known, dict) or not all(isinstance(value, str) for value in known.values()):
        raise ModelLoadError(f"{folder / DIGESTS} is no list of digests")
    there = {str(file.relative_to(folder)): file for file in files_of(folder)}
    for name in sorted({*known, *there}):
        if name not in there:
            raise ModelLoadError(f"{folder} lacks the file {io.printable(name)[:100]}; get a fresh copy")
        if known.get(name) != tensors.file_digest(there[name]):
            raise ModelLoadError(
                f"{there[name]} is not the file that {DIGESTS} names: it was changed; get a fresh copy"
            )


def write_digests(folder: Path) -> None:
    """Write the digests of the weights and configurations in a folder beside them."""
    found = {str(file.relative_to(folder)): tensors.file_digest(file) for file in files_of(folder)}
    (folder / DIGESTS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def files_of(folder: Path) -> list[Path]:
    """The weights and configurations in a folder and the folders in it, in order."""
    names = ("*.safetensors", "*/*.safetensors", "*/config.json")
    return sorted(file for name in names for file in folder.glob(name) if file.is_file())


def load_part(path: Path, cls: Any, headers: bool = False, **config: Any) -> Any:
    """An encoder or decoder from a folder with config.json, or from a published file (its sizes are the defaults).

    With `headers` it stays on the meta device.

    Raises:
        ModelLoadError: the file is broken, or is something else; what it is is named.
    """
    file = path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
    if not file.exists():
        raise ModelLoadError(f"no such file: {file}")
    found_tensors = read_weights(file, headers)
    if path.is_dir():
        config = read_config(path / "config.json")
    with torch.device("meta"):
        try:
            model = cls.from_config(config)
        except Exception as error:  # modules refuse impossible sizes with many kinds of errors
            reason = io.printable(io.first_line(error))
            raise ModelLoadError(f"{path / 'config.json'} describes no {cls.__name__}: {reason}") from error
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    found = {name: list(value.shape) for name, value in found_tensors.items()}
    if wanted != found:
        role = "a transparency encoder" if "Encoder" in cls.__name__ else "a transparent decoder"
        kind = kind_of(found_tensors)
        other = "of other sizes" if kind == role else f"but {kind}"
        raise ModelLoadError(f"{file} is not {role} as this model needs it, {other}")
    model.load_state_dict({name: value.float() for name, value in found_tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def read_config(file: Path) -> dict[str, Any]:
    """The configuration of an encoder or decoder, every value of it within its `LIMITS`.

    Raises:
        ModelLoadError: it is no table, or a value is something else than a network of this kind can have.
    """
    config = io.read_json(file, error=ModelLoadError, limit=2**20)
    if not isinstance(config, dict):
        raise ModelLoadError(f"{file} describes no network: it is no table")
    for key, (kind, low, high) in LIMITS.items():
        if key not in config:
            continue
        value = config[key]
        each = value if key == "block_out_channels" and isinstance(value, list) and 1 < len(value) <= 12 else [value]
        if (key == "block_out_channels") != isinstance(value, list) or not all(
            type(one) in kind and low <= one <= high for one in each
        ):
            several = "2 to 12 whole numbers" if key == "block_out_channels" else "a number"
            raise ModelLoadError(f"{file}: {key} must be {several} from {low} to {high}, got {str(value)[:60]}")
    return config
