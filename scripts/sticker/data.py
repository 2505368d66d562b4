"""The sticker data set as training data: the image cache, captions, the tokenizer, and the choice of images.

The data folder holds ``captions.jsonl`` (one row per image) and the zips that its rows name in ``file``. The work
folder receives ``images.npy`` (uint8, N x size x size x 4, premultiplied alpha), ``rows.jsonl`` (the same N rows),
``tokenizer/`` and ``tokens.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from diffusion_accel.outputs import replacing_folder
from diffusion_accel.training.archives import Row, caption_of, read_images, read_rows
from diffusion_accel.training.arrays import load_array, load_tensors
from diffusion_accel.training.files import UsageError, replacing, require, rows_of, write_json_lines

from .flux import train_states_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    from .models import Shape

VARIANTS = 8  # captions per image


# ------------------------------------------------------------------------------------------- images
def cache_images(data: Path, work: Path, size: int) -> tuple[int, ...]:
    """Unpack every image of the data set into ``images.npy`` and ``rows.jsonl``; returns the array's shape."""
    rows = read_rows(data)
    parts = [
        read_images(data, rows[i : i + 256], size) for i in tqdm(range(0, len(rows), 256), desc="cache", disable=None)
    ]
    images = np.concatenate(parts)
    with replacing(work / "images.npy") as temporary:
        np.save(temporary, images, allow_pickle=False)
    write_json_lines(work / "rows.jsonl", rows)
    return images.shape


def load_images(work: Path) -> np.ndarray:
    """The image cache, mapped into memory and read-only: uint8 (N, size, size, 4), premultiplied."""
    return load_array(require(work / "images.npy", "cache"))


def load_rows(work: Path) -> list[Row]:
    """The rows of the cached images, with the keys that training reads."""
    file = require(work / "rows.jsonl", "cache")
    return rows_of(file, slug=str, style=str, name=str, split=str, core=(bool, int))


# ------------------------------------------------------------------------------------------- choice of images
def read_concepts(path: Path) -> list[str]:
    """Concept slugs, one a line; lines that begin with # are comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"cannot read the concept list {path}: {error.strerror}") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def select(rows: list[Row], styles: Iterable[str], concepts: Iterable[str] | None = None) -> np.ndarray:
    """Indices of the core images in these styles, of these concepts (default: of all)."""
    styles, wanted = set(styles), None if concepts is None else set(concepts)
    unknown = sorted(styles - {row["style"] for row in rows})
    if wanted is not None:
        unknown += sorted(wanted - {row["slug"] for row in rows})
    if unknown:
        raise UsageError(f"not in the data set: {', '.join(unknown[:5])}")
    chosen = [
        i
        for i, row in enumerate(rows)
        if row["core"] and row["style"] in styles and (wanted is None or row["slug"] in wanted)
    ]
    if not chosen:
        raise UsageError("no core image of the data set has one of these styles and concepts")
    return np.array(chosen)


def surroundings(rows: list[Row], styles: Iterable[str]) -> np.ndarray:
    """Indices of the images of every core concept in these styles, whether or not the style is a core one."""
    styles, slugs = set(styles), {row["slug"] for row in rows if row["core"]}
    if unknown := sorted(styles - {row["style"] for row in rows}):
        raise UsageError(f"not in the data set: {', '.join(unknown)}")
    return np.array([i for i, row in enumerate(rows) if row["slug"] in slugs and row["style"] in styles], int)


def of_split(rows: list[Row], split: str, indices: Iterable[int] | None = None) -> np.ndarray:
    """Those of the indices (default: all) whose row is in a split, "train" or "heldout"."""
    return np.array([i for i in (range(len(rows)) if indices is None else indices) if rows[i]["split"] == split], int)


# ------------------------------------------------------------------------------------------- captions and tokenizer
def caption_variants(row: Row) -> list[str]:
    """The `VARIANTS` captions of an image; the first is the canonical one."""
    name, style = row["name"], row["style_words"]
    article = "an" if name[0] in "aeiou" else "a"
    keywords = ", ".join([word for word in row["keywords"] if word != name][:2]) or name
    return [
        caption_of(row),
        f"{article} {name}, {style} style",
        f"{name}, {style} style",
        f"{style} style {name}",
        f"{style} emoji of {article} {name}",
        f"{name}, {keywords}, {style} style",
        f"{article} {name} sticker in {style} style",
        name,
    ]


def train_tokenizer(corpus: Iterable[str], vocabulary: int, max_length: int) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's format.

    `vocabulary` counts the 512 bytes (with and without the end-of-word mark), the merges and the two special tokens;
    the special tokens come last (begin V-2, end and padding V-1), where CLIPTextModel looks for the end of a text.
    `max_length` is in tokens, the two special ones included. A corpus too small for it gives a smaller vocabulary.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    if vocabulary < 514:
        raise UsageError(f"the vocabulary must have at least 514 entries, got {vocabulary}")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    reference = CLIPTokenizer().backend_tokenizer  # only for its normalizer and its way to split words
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = reference.normalizer, reference.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(corpus, trainer)
    learned = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    merges = learned[: vocabulary - 2 * len(alphabet) - 2]
    tokens = alphabet + [f"{letter}</w>" for letter in alphabet]
    tokens = list(dict.fromkeys(tokens + [first + second for first, second in merges]))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=max_length)


def tokenizer_corpus(rows: list[Row]) -> list[str]:
    """All captions, keywords and group names, and some common words that no caption has."""
    common = "red orange yellow green blue purple pink brown black white grey background photo of picture drawing icon"
    corpus = []
    for row in rows:
        corpus += caption_variants(row) + row["keywords"]
        corpus += [row["group"].replace("-", " "), row["subgroup"].replace("-", " ")]
    return corpus + [f"{common} on in with and the"] * 50


def build_tokenizers(work: Path, shape: Shape) -> CLIPTokenizer:
    """Train the tokenizers on the cached rows and tokenize every caption; returns the first of them.

    Writes ``tokenizer/``, for a transformer ``tokenizer_2/`` too, and ``tokens.safetensors``: "captions" int32 (N,
    VARIANTS, tokens) and "empty" (tokens), where the ids of two tokenizers lie side by side.
    """
    rows = load_rows(work)
    corpus = tokenizer_corpus(rows)
    trained: dict[str, Any] = {"tokenizer": train_tokenizer(corpus, shape.vocabulary, shape.max_length)}
    if shape.transformer_blocks:
        trained["tokenizer_2"] = train_states_tokenizer(corpus, shape.vocabulary)
    for name, tokenizer in trained.items():
        with replacing_folder(work / name) as folder:
            tokenizer.save_pretrained(folder)
    tokenizers: list[Any] = [load_tokenizer(work)]
    if shape.transformer_blocks:
        tokenizers.append(load_states_tokenizer(work))
    captions = [caption for row in rows for caption in caption_variants(row)]
    ids = token_ids(tokenizers, captions).int().view(len(rows), VARIANTS, -1)
    with replacing(work / "tokens.safetensors") as temporary:
        save_file({"captions": ids, "empty": token_ids(tokenizers, [""])[0].int()}, temporary)
    return tokenizers[0]


def token_ids(tokenizers: Iterable[Any], texts: list[str]) -> torch.Tensor:
    """Ids int64 (N, tokens) of texts, padded to the longest that each tokenizer has, side by side."""
    parts = [
        tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids
        for tokenizer in tokenizers
    ]
    return torch.cat([torch.tensor(part) for part in parts], 1)


def load_tokenizer(work: Path) -> CLIPTokenizer:
    """The first tokenizer that `build_tokenizers` wrote."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(require(work / "tokenizer", "tokenizer"))


def load_states_tokenizer(work: Path) -> PreTrainedTokenizerFast:
    """The second tokenizer that `build_tokenizers` wrote, of a transformer."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(require(work / "tokenizer_2", "tokenizer"))


def load_tokens(work: Path) -> dict[str, torch.Tensor]:
    """The token ids of all captions (N, VARIANTS, tokens), as "captions", and of the empty text, as "empty"."""
    return load_tensors(require(work / "tokens.safetensors", "tokenizer"), "captions", "empty")
