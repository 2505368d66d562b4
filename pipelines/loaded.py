"""What was loaded, before it is used: every tensor there and finite, every tokenizer able to read, every LoRA whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from diffusion_accel.diffusers_compat import has_offload_hook
from diffusion_accel.errors import ModelLoadError
from diffusion_accel.finite import finite
from diffusion_accel.io import first_line, printable
from diffusion_accel.model_files.headers import check_weights, safetensors_header

# how the two factors of a low-rank product are called
_HALVES = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"))


def check_loaded(parts: dict[str, Any], where: str) -> None:
    """Refuse models of which a tensor was not loaded or is not a number.

    One pass over the weights in memory. Parts of another package (quantized, offloaded) are left to it.

    Args:
        parts: components by name; those that are no models are left out.
        where: what was loaded, the first words of an error.

    Raises:
        ModelLoadError: with the component and the name of the tensor.
    """
    for part, model in parts.items():
        if not isinstance(model, torch.nn.Module) or has_offload_hook(model) or hasattr(model, "hf_device_map"):
            continue
        for name, value in model.named_parameters():
            if value.is_meta:
                raise ModelLoadError(f"{where} cannot be loaded: the weights of its {part} have no {printable(name)}")
            if not finite(value):
                raise ModelLoadError(
                    f"{where} cannot be used: {printable(name)} of its {part} holds numbers that are not finite "
                    "(NaN or infinity); get a fresh copy"
                )


def check_tokenizers(parts: dict[str, Any], where: str) -> None:
    """Refuse a tokenizer that cannot read a prompt, or whose ids its text encoder does not know: a special token that
    is not in the vocabulary is found out at the first call only.

    Args:
        parts: the components of a loaded pipeline by name.
        where: what was loaded, the first words of an error.
    """
    for name, tokenizer in parts.items():
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            continue
        encoder = parts.get(name.replace("tokenizer", "text_encoder"))
        length = min(tokenizer.model_max_length, 16)
        try:
            padding: Any = "max_length" if tokenizer.pad_token is not None else False
            ids = tokenizer("a \u0001", padding=padding, max_length=length, truncation=True).input_ids
        except Exception as error:  # tokenizers raise bare ones
            raise ModelLoadError(f"{Path(where) / name} cannot read a prompt: {first_line(error)}") from error
        embeddings = getattr(encoder, "get_input_embeddings", lambda: None)()
        count = getattr(embeddings, "num_embeddings", None)
        if count is not None and max(ids, default=0) >= count:
            raise ModelLoadError(
                f"{Path(where) / name} has a token of number {max(ids)}, and its text encoder knows {count}; look at "
                "the special tokens in tokenizer_config.json"
            )


def reason_of(error: BaseException) -> str:
    """The first line of an error about weights, without diffusers' advice of how to load them all the same."""
    return first_line(first_line(error, 10_000).partition(". If you want to instead overwrite")[0])


def check_lora(file: Path) -> None:
    """Check a LoRA file: whole, finite, and both halves of every product there.

    peft fills a missing half with random numbers.

    Raises:
        ModelLoadError: with the name of the tensor.
    """
    check_weights(file, allow_pickle=None)
    names = [name for name in safetensors_header(file) if name != "__metadata__"]
    known = set(names)
    for name in names:
        for one, other in _HALVES:
            if one in name and name.replace(one, other) not in known:
                raise ModelLoadError(f"the LoRA {file} is damaged: {printable(name)} is there without its {other}")
            if other in name and name.replace(other, one) not in known:
                raise ModelLoadError(f"the LoRA {file} is damaged: {printable(name)} is there without its {one}")
    for name, value in load_file(file).items():
        if not finite(value):
            raise ModelLoadError(f"the LoRA {file} is damaged: {printable(name)} holds numbers that are not finite")
