"""A whole pipeline folder with random weights, small enough to be written, broken and loaded many times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from zoo import DIM, seeded, unet, vae

from diffusion_accel import ModelLoadError
from diffusion_accel.pipelines.loading import load_pipeline

TOKENS = 8
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
WORDS = ("<|startoftext|>", "<|endoftext|>", "red", "apple", "a", "e", "l", "p", "r", "d")


def tokenizer() -> Any:
    """Words and letters of one prompt."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[1]))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"bos_token": WORDS[0], "eos_token": WORDS[1], "pad_token": WORDS[1], "unk_token": WORDS[1]}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS, **ends)


def text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=DIM,
        intermediate_size=DIM,
        projection_dim=DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return seeded(lambda: CLIPTextModel(config))


def write_folder(folder: Path) -> Path:
    """A StableDiffusionPipeline of 16x16 images."""
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a safetensors file in place."""
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def draw(pipe: Any, **changes: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "output_type": "pt", **changes}
    return pipe("red apple", generator=torch.Generator().manual_seed(0), **settings).images


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ModelLoadError) as error:
        load_pipeline(str(folder))
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text
