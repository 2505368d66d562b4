"""Which images are drawn how often, and the tokenizer of the captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sticker import data as sticker_data
from sticker.tasks import Captioned


@pytest.mark.slow
def test_images_around_the_list_are_drawn_a_third_as_often_and_not_watched(work: Path) -> None:
    captioned = Captioned.load(work)
    styles = [row["style"] for row in captioned.rows]
    assert len(captioned.watched) == 11 and len(captioned.heldout) == 1 and len(captioned.rows) == 18
    counts = np.bincount(captioned.train, minlength=18)
    assert [counts[i] for i in captioned.watched] == [3] * 11 and counts[captioned.heldout[0]] == 0
    assert all(counts[i] == 1 for i in range(18) if styles[i] == "blob")


@pytest.mark.slow
def test_tokenizer_round_trip(work: Path) -> None:
    tokenizer = sticker_data.load_tokenizer(work)
    ids = tokenizer("a red disc, 3d style").input_ids
    assert ids[0] == tokenizer.bos_token_id == len(tokenizer) - 2
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red disc , 3 d style"
    assert tokenizer.decode(tokenizer("zebra Ünï 7").input_ids, skip_special_tokens=True) == "zebra ünï 7"
    tokens = sticker_data.load_tokens(work)
    first = sticker_data.caption_variants(sticker_data.load_rows(work)[0])[0]
    padded = tokenizer(first, padding="max_length", max_length=24).input_ids
    assert tokens["captions"][0, 0].tolist() == padded
