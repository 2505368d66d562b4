"""Stand-ins for the tiny tokenizers and configurations that diffusers' tests load from the hub, made here of letters.

They lie in a folder in the layout of the hub's cache, so that with HF_HUB_CACHE on it and HF_HUB_OFFLINE=1 the tests
find them under the names that they ask for. Their words are not the originals', so images are other ones than a test
that expects certain numbers was written with; all else is tested as it is meant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTokenizer,
    GemmaTokenizer,
    Qwen2Tokenizer,
    T5Config,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"-_()[]{}<>/\\|@#$%&*+=~^`"
ENDS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


def _numbered(*words: str) -> dict[str, int]:
    return {word: number for number, word in enumerate(dict.fromkeys(words))}


def _scored(*words: str) -> list[tuple[str, float]]:
    """The vocabulary of a unigram model: names without a score, then letters of the same one."""
    return [(word, 0.0) for word in words] + [("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]


def clip() -> Any:
    """A CLIP tokenizer that knows letters."""
    known = _numbered("<|startoftext|>", "!", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS))
    return CLIPTokenizer(vocab=known, merges=[], model_max_length=77, unk_token="<|endoftext|>", **ENDS)


def t5() -> Any:
    """A T5 tokenizer that knows letters."""
    names = ("<pad>", "</s>", "<unk>", *(f"<extra_id_{number}>" for number in range(99, -1, -1)))
    return T5Tokenizer(vocab=_scored(*names), model_max_length=512)


def t5_config() -> T5Config:
    """A T5 of 32 channels and two layers; without dropout, because some tests never leave the mode of training."""
    return T5Config(
        vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, dropout_rate=0.0,
        architectures=["T5ForConditionalGeneration"],
    )  # fmt: skip


def gemma() -> Any:
    """A Gemma tokenizer that knows letters."""
    return GemmaTokenizer(vocab=_numbered("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS), merges=[])


def qwen2() -> Any:
    """A Qwen 2 tokenizer that knows letters, with the numbers of the tokens around images that its models have."""
    known = _numbered("<|endoftext|>", "Ġ", "Ċ", *LETTERS)
    names = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
    names += ["<|image_pad|>", "<|video_pad|>"]
    made = Qwen2Tokenizer(vocab=known, merges=[], model_max_length=512)
    made.add_special_tokens({"additional_special_tokens": names})
    made.chat_template = CHAT
    return made


def roberta() -> Any:
    """An XLM-RoBERTa tokenizer that knows letters."""
    return XLMRobertaTokenizer(vocab=_scored("<s>", "<pad>", "</s>", "<unk>"), model_max_length=512)


def bert() -> Any:
    """A BERT tokenizer that knows letters."""
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    return BertTokenizer(vocab=_numbered(*names, *LETTERS, *(f"##{x}" for x in LETTERS)), model_max_length=512)


def bert_model() -> BertModel:
    """A BERT of 32 channels and one layer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=1124, **shape))


#: name on the hub -> what makes the parts of its folder
STAND_INS: dict[str, tuple[Any, ...]] = {
    "hf-internal-testing/tiny-random-clip": (clip,),
    "hf-internal-testing/tiny-random-t5": (t5, t5_config),
    "hf-internal-testing/dummy-gemma": (gemma,),
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": (qwen2,),
    "hf-internal-testing/tiny-random-BertModel": (bert, bert_model),
    "YiYiXu/tiny-random-mclip-base": (roberta,),
}
REVISION = "0" * 40


def make_hub(folder: Path) -> None:
    """Write the stand-ins that are not there yet into `folder`, in the layout of the hub's cache."""
    for name, parts in STAND_INS.items():
        place = folder / f"models--{name.replace('/', '--')}"
        done = place / "refs" / "main"
        if done.is_file():
            continue
        for part in parts:
            part().save_pretrained(place / "snapshots" / REVISION)
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text(REVISION, encoding="utf-8")
