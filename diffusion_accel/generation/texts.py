"""Prompts as a model reads them: what its tokenizers cut off, and weights of words, which compel reads."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from diffusion_accel.conditioning import call_parameters
from diffusion_accel.errors import ConfigurationError, UnsupportedPipelineError
from diffusion_accel.io import first_line, printable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SHOWN = 60  # characters of what is cut
_CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")


def cut_text(pipe: DiffusionPipeline, text: str, what: str = "prompt") -> str | None:
    """A sentence about what a pipeline does not read of a text; None if it reads all, or that is not known.

    A pipeline with several tokenizers reads as much as the one that reads most.
    """
    found = [cut for tokenizer in _tokenizers(pipe) if (cut := _cut(pipe, tokenizer, text)) is not None]
    if not found:
        return None
    length, limit, rest = max(found, key=lambda one: one[1])
    if not rest:
        return None
    rest = printable(rest.strip())
    rest = rest if len(rest) <= _SHOWN else f"{rest[:_SHOWN]}…"
    more = "; --prompt-weights reads all of it" if not why_no_weights(pipe) else ""
    return f'the {what} has {length} tokens; the model reads the first {limit}, without "{rest}"{more}'


def _tokenizers(pipe: DiffusionPipeline) -> list[Any]:
    named = {name: part for name, part in pipe.components.items() if name.startswith("tokenizer")}
    return [part for _, part in sorted(named.items()) if callable(part)]


def _cut(pipe: DiffusionPipeline, tokenizer: Any, text: str) -> tuple[int, int, str] | None:
    """How many tokens a text has, how many are read, and the text of the others; None where no limit is known."""
    usual = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    limits = [getattr(tokenizer, "model_max_length", None), None if usual is None else usual.default]
    limit = min((one for one in limits if isinstance(one, int) and one > 0), default=10**6)
    if limit >= 10**6:
        return None
    try:
        ids = tokenizer(text).input_ids
    except Exception:  # tokenizers of chats and images want to be called otherwise
        return None
    if len(ids) <= limit:
        return len(ids), limit, ""
    try:
        start = tokenizer(text, return_offsets_mapping=True)["offset_mapping"][limit - 1][0]
        return len(ids), limit, text[start:]
    except (NotImplementedError, KeyError, IndexError):  # a tokenizer in Python
        return len(ids), limit, tokenizer.decode(ids[limit - 1 : -1])


# ------------------------------------------------------------------------------------------- weights of words
def why_no_weights(pipe: DiffusionPipeline) -> str | None:
    """Why a pipeline cannot be given weights of words; None if it can."""
    takes = call_parameters(pipe)
    encoders = [type(getattr(pipe, name, None)).__name__ for name in ("text_encoder", "text_encoder_2")]
    third = getattr(pipe, "text_encoder_3", None)
    single = encoders[0] == _CLIP[0] and encoders[1] == "NoneType" and "pooled_prompt_embeds" not in takes
    double = encoders == [*_CLIP] and third is None and "pooled_prompt_embeds" in takes
    if "prompt_embeds" in takes and "negative_prompt_embeds" in takes and (single or double):
        return None
    return "weights of words are for models whose texts CLIP reads (Stable Diffusion 1, 2 and XL)"


def weighted(pipe: DiffusionPipeline, prompt: str, negative: str | None) -> dict[str, Any]:
    """The arguments of a call in the place of `prompt` and `negative_prompt`: embeddings of texts with weights, "a
    (red)1.4 apple", "red++", of any length.

    Args:
        pipe: for which `why_no_weights` is None.
        prompt, negative: in compel's syntax; None: an empty text.

    Raises:
        ConfigurationError: compel is not installed, or cannot read a text.
        UnsupportedPipelineError: the pipeline has no such text encoders.
    """
    if reason := why_no_weights(pipe):
        raise UnsupportedPipelineError(f"prompt_weights cannot be used on {type(pipe).__name__}: {reason}")
    try:
        from compel import CompelForSD, CompelForSDXL  # an extra
    except ImportError as error:
        raise ConfigurationError("prompt_weights needs compel: pip install 'diffusion-accel[prompts]'") from error
    kind = CompelForSDXL if "pooled_prompt_embeds" in call_parameters(pipe) else CompelForSD
    try:
        made = kind(pipe)(prompt, negative_prompt=negative or "")
    except Exception as error:  # its parser raises many kinds
        raise ConfigurationError(f"prompt_weights: the prompt cannot be read: {first_line(error)}") from error
    found = {
        "prompt_embeds": made.embeds,
        "negative_prompt_embeds": made.negative_embeds,
        "pooled_prompt_embeds": made.pooled_embeds,
        "negative_pooled_prompt_embeds": made.negative_pooled_embeds,
    }
    zeros = negative is None and getattr(pipe.config, "force_zeros_for_empty_prompt", False)  # which SDXL makes itself
    return {n: value for n, value in found.items() if value is not None and not (zeros and n.startswith("negative"))}
