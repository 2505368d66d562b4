"""Where the weights of latent transparency are, for which model, and what the published files are called."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_accel import io
from diffusion_accel.denoisers import find_denoiser
from diffusion_accel.diffusers_compat import origin_of
from diffusion_accel.errors import ModelLoadError
from diffusion_accel.io import at_home
from diffusion_accel.model_files import tensors
from diffusion_accel.model_files.hub import hub_reason
from diffusion_accel.model_files.names import EMBEDDED, safetensors_header
from diffusion_accel.model_files.names import TRANSPARENCY as FOLDER

from .attention_sharing import is_sharing

ADAPTER = "adapter.safetensors"
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

# Published files: family -> part -> names. Encoders: with the factor of their output.
ENCODERS: dict[str, dict[str, float]] = {
    "sdxl": {
        "ld_diffusers_sdxl_vae_transparent_encoder.safetensors": 300.0,
        "vae_transparent_encoder.safetensors": 1.0,
    },
    "sd15": {"layer_sd15_vae_transparent_encoder.safetensors": 1.0},
}
DECODERS: dict[str, tuple[str, ...]] = {
    "sdxl": ("ld_diffusers_sdxl_vae_transparent_decoder.safetensors", "vae_transparent_decoder.safetensors"),
    "sd15": ("layer_sd15_vae_transparent_decoder.safetensors",),
}
ADAPTERS: dict[str, dict[str, tuple[str, ...]]] = {
    "sdxl": {
        "fg": ("ld_diffusers_sdxl_attn.safetensors", "layer_xl_transparent_attn.safetensors"),
        "fg-conv": ("layer_xl_transparent_conv.safetensors",),
        "fg2blend": ("layer_xl_fg2ble.safetensors",),
        "bg2blend": ("layer_xl_bg2ble.safetensors",),
        "fgblend2bg": ("layer_xl_fgble2bg.safetensors",),
        "bgblend2fg": ("layer_xl_bgble2fg.safetensors",),
    },
    "sd15": {
        "fg": ("layer_sd15_transparent_attn.safetensors",),
        "joint": ("layer_sd15_joint.safetensors",),
        "fg2bg": ("layer_sd15_fg2bg.safetensors",),
        "bg2fg": ("layer_sd15_bg2fg.safetensors",),
    },
}


@dataclass(frozen=True)
class Parts:
    """The files of one setting.

    Attributes:
        encoder, decoder: a folder with a config.json, or a published file; None: not there.
        offset_scale: factor of a published encoder's output; None where its config.json says it.
        adapter: the file that changes the base model; None: not there.
    """

    encoder: Path | None
    decoder: Path | None
    offset_scale: float | None
    adapter: Path | None


def family_of(unet: Any) -> str | None:
    """ "sdxl" or "sd15", by the width of the text and whether sizes are an input; None for others."""
    config = getattr(unet, "config", {})
    width, extra = config.get("cross_attention_dim"), config.get("addition_embed_type")
    if width == 2048 and extra == "text_time":
        return "sdxl"
    return "sd15" if width == 768 and extra is None else None


def find_parts(pipeline: Any, weights: str, variant: str, adapter: str) -> Parts:
    """The files for `pipeline`: beside its own model, in the folder or hub repository `weights`, or in that `adapter`.

    Raises:
        ModelLoadError: nothing is there, or not for this family of models; with what was looked for.
    """
    unet = find_denoiser(pipeline)
    family = family_of(unet)
    own = Path(adapter) if adapter else None
    if own is not None and not own.is_file():
        raise ModelLoadError(f"transparent: no such adapter file: {adapter}")
    folder = _folder(pipeline, weights)
    if folder is not None and (folder / "decoder" / "config.json").exists():
        encoder = folder / "encoder"
        beside = folder / ADAPTER if variant == "fg" else folder / f"{variant}.safetensors"
        if own is None and not beside.exists() and variant != "fg":
            raise ModelLoadError(f"{folder} has no weights for the variant {variant!r} ({beside.name})")
        has_encoder = (encoder / "config.json").exists()
        found = own or (beside if beside.exists() else None)
        return Parts(encoder if has_encoder else None, folder / "decoder", None, found)
    if folder is None and not weights:
        raise ModelLoadError(
            f"no weights for transparency are beside this model (a folder {FOLDER}/); name a folder or a hub id with "
            "them, for example weights=LayerDiffusion/layerdiffusion-v1 for SD 1.5 and SDXL"
        )
    where = folder if folder is not None else weights
    if family is None:
        raise ModelLoadError(
            f"{where} has no {FOLDER} weights made for this model, and published ones exist for SD 1.5 and SDXL only, "
            f"which this {type(unet).__name__} is not"
        )
    if variant not in ADAPTERS[family]:
        raise ModelLoadError(
            f"the variant {variant!r} does not exist for {family}; there are: {', '.join(ADAPTERS[family])}"
        )

    def get(names: Any, needed: str | None) -> Path | None:
        for name in names:
            path = folder / name if folder is not None else _from_hub(weights, name)
            if path is not None and path.is_file():
                return path
        if needed:
            others = [f for f in DECODERS if f != family and _any(folder, DECODERS[f])]
            hint = f"; it has the files of {others[0]}, this model is {family}" if others else ""
            raise ModelLoadError(f"{where} has no {needed} for {family} ({' or '.join(names)}){hint}")
        return None

    encoder_file = get(ENCODERS[family], None)
    return Parts(
        encoder_file,
        get(DECODERS[family], "transparent decoder"),
        ENCODERS[family][encoder_file.name] if encoder_file else None,
        own or get(ADAPTERS[family][variant], f"adapter for {variant!r}"),
    )


def _any(folder: Path | None, names: tuple[str, ...]) -> bool:
    return folder is not None and any((folder / name).is_file() for name in names)


def _folder(pipeline: Any, weights: str) -> Path | None:
    """The local folder to look in; None: a hub id, or nothing."""
    if weights in EMBEDDED:
        return EMBEDDED[weights].path / FOLDER
    if weights:
        path = at_home(weights)
        if path.is_dir():
            return path / FOLDER if (path / FOLDER).is_dir() else path
        if path.exists() or weights.startswith((".", "/", "~")) or weights.count("/") != 1:
            raise ModelLoadError(f"transparent: no such folder of weights: {weights}")
        return None
    for owner in (pipeline, find_denoiser(pipeline), getattr(pipeline, "vae", None)):
        name = origin_of(owner)
        for folder in (Path(name), Path(name).parent) if name else ():
            if (folder / FOLDER).is_dir():
                return folder / FOLDER
    return None


def _from_hub(repository: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name))
    except LocalEntryNotFoundError as error:
        raise ModelLoadError(
            f"{repository}/{name} is not on this machine and cannot be downloaded; "
            "check the connection, or name a local folder"
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = hub_reason(repository, error) or io.first_line(error)
        raise ModelLoadError(f"{repository} cannot be read: {reason}") from error


# ------------------------------------------------------------------------------------------- reading
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


def read_tensors(file: Path, headers: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; with `headers` without their values, on the meta device.

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
    found_tensors = read_tensors(file, headers)
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
