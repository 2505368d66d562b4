"""ControlNets beside a U-Net: whether one fits it, said before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_accel.denoisers import find_controlnet
from diffusion_accel.errors import ModelLoadError
from diffusion_accel.hooks import model_of
from diffusion_accel.io import is_there, read_json
from diffusion_accel.model_files.names import ModelSource

from .keywords import components_of


def check_before(source: ModelSource, cls: type | None, nets: Mapping[str, Any]) -> None:
    """Refuse ControlNets that do not fit a model that is not loaded yet, as far as its folder tells.

    Args:
        source: the model.
        cls: its pipeline class; None: that is not known.
        nets: loaded ones by the names that they were asked for by.

    Raises:
        ModelLoadError: see `check_fits`.
    """
    if nets and cls is not None and "unet" not in components_of(cls):
        raise ModelLoadError(f"a ControlNet runs beside a U-Net, and {cls.__name__} has none: leave {min(nets)} out")
    file = Path(source.location) / "unet" / "config.json"
    if nets and source.kind != "hub" and is_there(file, "file"):
        unet = read_json(file, error=ModelLoadError, nonfinite=True)
        for name, net in nets.items():
            check_fits(f"the ControlNet {name}", net, unet)


def check_own(pipe: Any, where: str) -> None:
    """The same for the ControlNets of a loaded pipeline."""
    found, unet = find_controlnet(pipe), getattr(pipe, "unet", None)
    model = None if found is None else model_of(found)
    for net in getattr(model, "nets", [model]):
        if unet is not None and type(net).__name__ == "ControlNetModel":  # others name their models in other ways
            check_fits(f"the ControlNet of {where}", net, model_of(unet).config)


def check_fits(what: str, net: Any, unet: Mapping[str, Any]) -> None:
    """Refuse a ControlNet whose numbers could not be added to those of a U-Net, or that reads what there is not.

    Args:
        what: the first words of the error.
        net: a ControlNetModel.
        unet: the configuration of the U-Net.

    Raises:
        ModelLoadError: with what it has, and what the model has.
    """
    own = net.config

    def refuse(has: str, wanted: str) -> None:
        raise ModelLoadError(f"{what} does not fit this model: {has}, and the model {wanted}")

    latents = unet.get("in_channels"), unet.get("out_channels")  # a U-Net for inpainting takes more than latents
    if own.in_channels not in latents and None not in latents:
        refuse(f"it takes latents of {own.in_channels} channels", f"has {latents[1]}")
    for key, words in (("block_out_channels", "channels of its blocks"), ("layers_per_block", "layers of its blocks")):
        here, there = _each(own, key), _each(unet, key)
        if there and here != there:
            refuse(f"the {words} are {_listed(here)}", f"has {_listed(there)}")
    blocks = [number for number, kind in enumerate(own.down_block_types) if "CrossAttn" in kind]
    if blocks and not own.get("encoder_hid_dim") and not unet.get("encoder_hid_dim"):
        here, there = (_each(values, "cross_attention_dim") for values in (own, unet))
        if there and here[blocks[0]] != there[blocks[0]]:
            refuse(f"it reads texts of {here[blocks[0]]} numbers a token", f"gives {there[blocks[0]]}")
    if own.get("addition_embed_type") not in (None, unet.get("addition_embed_type")):
        refuse(f"it reads {own.addition_embed_type} beside the prompt, as those of SDXL do", "has nothing of the kind")
    inputs = own.get("projection_class_embeddings_input_dim"), unet.get("projection_class_embeddings_input_dim")
    if own.get("addition_embed_type") == "text_time" and inputs[0] != inputs[1]:
        refuse(f"it reads {inputs[0]} numbers beside the prompt", f"gives {inputs[1]}")


def _each(config: Mapping[str, Any], key: str) -> list[Any]:
    """A setting for each block; nothing where the configuration does not say it."""
    value, count = config.get(key), len(config.get("block_out_channels") or ())
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value] * count


def _listed(values: list[Any]) -> str:
    return ", ".join(map(str, values))
