"""LoRAs are whole, or refused with the name of the tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from zoo import rand

from diffusion_accel import ModelLoadError
from diffusion_accel.pipelines.loading import load_lora, load_pipeline


def test_halves_of_a_lora(whole: Path, tmp_path: Path) -> None:
    pipe, file = load_pipeline(str(whole)), tmp_path / "lora.safetensors"
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    good = {f"{key}.lora_A.weight": rand(2, 32), f"{key}.lora_B.weight": rand(32, 2)}
    cases = [
        ({k: v for k, v in good.items() if "lora_A" in k}, "lora_B"),
        ({k: v for k, v in good.items() if "lora_B" in k}, "lora_A"),
        (good | {f"{key}.lora_A.weight": torch.full((2, 32), torch.nan)}, "not finite"),
    ]
    for tensors, word in cases:
        save_file(tensors, file)
        with pytest.raises(ModelLoadError, match=word):
            load_lora(pipe, str(file), "one")
    save_file(good, file)
    load_lora(pipe, str(file), "one")
