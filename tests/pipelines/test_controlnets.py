"""ControlNets that do not fit the model beside which they are to run: one line, before the model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from zoo import DIM, UNET, controlnet_model

from diffusion_accel.errors import ModelLoadError
from diffusion_accel.pipelines.controlnets import check_fits
from diffusion_accel.pipelines.loading import load_pipeline


def net(**changes: Any) -> ControlNetModel:
    keys = ("block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim", "norm_num_groups")
    usual = {**{k: UNET[k] for k in keys}, "in_channels": 4, "attention_head_dim": 4}
    return ControlNetModel(**{**usual, "conditioning_embedding_out_channels": (8, 16), **changes})


SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
WORDS = [
    ({"in_channels": 9}, "it takes latents of 9 channels, and the model has 4"),
    ({"block_out_channels": (8, 16)}, "the channels of its blocks are 8, 16, and the model has 16, 32"),
    ({"layers_per_block": 2}, "the layers of its blocks are 2, 2, and the model has 1, 1"),
    ({"cross_attention_dim": 24}, f"it reads texts of 24 numbers a token, and the model gives {DIM}"),
    (SDXL, "it reads text_time beside the prompt, as those of SDXL do, and the model has nothing of the kind"),
]


@pytest.mark.parametrize(("changes", "words"), WORDS, ids=[next(iter(changes)) for changes, _ in WORDS])
def test_what_does_not_fit(
    changes: dict[str, Any], words: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net(**changes).save_pretrained(tmp_path / "net")
    controlnet_model().save_pretrained(tmp_path / "fits")
    parts = load_pipeline(str(whole)).components
    odd = StableDiffusionControlNetPipeline(**parts, controlnet=net(**changes), requires_safety_checker=False)
    odd.save_pretrained(tmp_path / "odd")
    with pytest.raises(ModelLoadError, match=f"the ControlNet of {tmp_path / 'odd'} does not fit this model: {words}"):
        load_pipeline(str(tmp_path / "odd"))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("the model is loaded"))
    for named in (tmp_path / "net", [tmp_path / "fits", tmp_path / "net"]):
        with pytest.raises(ModelLoadError, match=f"the ControlNet {tmp_path / 'net'} does not fit this model: {words}"):
            load_pipeline(str(whole), controlnet=named)


def test_a_model_without_a_unet(tmp_path: Path) -> None:
    controlnet_model().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="a ControlNet runs beside a U-Net, and FluxPipeline has none: leave "):
        load_pipeline("sticker-dit", controlnet=str(tmp_path))


def test_what_fits() -> None:
    """A U-Net for inpainting takes more than latents; small ones of SDXL read no texts; Kolors projects its texts."""
    unet = {**UNET, "in_channels": 9, "out_channels": 4, "layers_per_block": [1, 1]}
    check_fits("x", net(), unet)
    plain = {"down_block_types": ("DownBlock2D",) * 2, "mid_block_type": "UNetMidBlock2D", "cross_attention_dim": 99}
    check_fits("x", net(**plain), unet)
    projected = {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"}
    check_fits("x", net(**projected, cross_attention_dim=24), unet | projected)
    check_fits("x", net(**SDXL), unet | SDXL)
    with pytest.raises(ModelLoadError, match="it reads 80 numbers beside the prompt, and the model gives 64"):
        check_fits("x", net(**SDXL), unet | SDXL | {"projection_class_embeddings_input_dim": 64})
    check_fits("x", net().to(torch.bfloat16), {})
