"""Where the weights of latent transparency are, for which model, and what the published files are called."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from diffusion_accel.denoisers import find_denoiser
from diffusion_accel.errors import ModelLoadError
from diffusion_accel.io import at_home, first_line
from diffusion_accel.model_files.hub import hub_reason
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.model_files.names import TRANSPARENCY as FOLDER
from diffusion_accel.recipes.saving import folder_beside

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ADAPTER = "adapter.safetensors"
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


def family_of(unet: nn.Module) -> str | None:
    """ "sdxl" or "sd15", by the width of the text and whether sizes are an input; None for others."""
    config: Any = getattr(unet, "config", {})
    width, extra = config.get("cross_attention_dim"), config.get("addition_embed_type")
    if width == 2048 and extra == "text_time":
        return "sdxl"
    return "sd15" if width == 768 and extra is None else None


def find_parts(pipeline: DiffusionPipeline, weights: str, variant: str, adapter: str) -> Parts:
    """The files for `pipeline`: beside its own model, in the folder or hub repository `weights`, or in that `adapter`.

    Raises:
        ModelLoadError: nothing is there, or not for this family of models; with what was looked for.
    """
    unet: Any = find_denoiser(pipeline)
    family = family_of(unet)
    own = Path(adapter) if adapter else None
    if own is not None and not own.is_file():
        raise ModelLoadError(f"transparent: no such adapter file: {adapter}")
    folder = local_folder(pipeline, weights)
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

    def get(names: Iterable[str], needed: str | None) -> Path | None:
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


def local_folder(pipeline: DiffusionPipeline, weights: str) -> Path | None:
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
    return folder_beside(pipeline, FOLDER)


def _from_hub(repository: str, name: str) -> Path | None:
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
        reason = hub_reason(repository, error) or first_line(error)
        raise ModelLoadError(f"{repository} cannot be read: {reason}") from error
