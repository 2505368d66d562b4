"""Combinations: their text, their limits, and what they make of tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_accel.combination import MOST, Combination
from diffusion_accel.errors import ConfigurationError

numbers = st.floats(-MOST, MOST).map(lambda v: round(v, 6) + 0.0)


@st.composite
def combinations(draw):
    channels, count, latents = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    rows = st.lists(numbers, min_size=count, max_size=count).map(tuple)
    others = st.lists(numbers, min_size=latents, max_size=latents).map(tuple)
    apart = st.lists(numbers, min_size=latents, max_size=latents).map(tuple) if draw(st.booleans()) else st.just(())
    return Combination(
        tuple(draw(rows) for _ in range(channels)),
        tuple(draw(others) for _ in range(channels)),
        tuple(draw(apart) for _ in range(channels)),
    )


@given(combinations())
def test_text_is_read_back(combination):
    assert Combination.parse(str(combination)) == combination


@given(combinations(), st.integers(0, 2**16))
def test_apply_is_the_sum_for_each_channel(combination, seed):
    generator = torch.Generator().manual_seed(seed)
    channels = max(combination.channels, 1)
    y = [torch.randn(2, channels, 3, 2, dtype=torch.float64, generator=generator) for _ in range(combination.count)]
    x = [torch.randn(2, channels, 3, 2, dtype=torch.float64, generator=generator) for _ in range(3)]
    d = [torch.randn(2, channels, 3, 2, dtype=torch.float64, generator=generator) for _ in range(3)]
    mixed = combination.apply(y, x, d)
    for c in range(channels):
        wanted = sum(w * v[:, c] for w, v in zip(combination.predictions[c], y, strict=True))
        wanted = wanted + sum(w * v[:, c] for w, v in zip(combination.latents[c], x, strict=False))
        wanted = wanted + sum(w * v[:, c] for w, v in zip(combination.additions[c], d, strict=False))
        torch.testing.assert_close(mixed[:, c], wanted)
    tokens = combination.apply(
        [v.flatten(2).transpose(1, 2) for v in y],
        [v.flatten(2).transpose(1, 2) for v in x],
        [v.flatten(2).transpose(1, 2) for v in d],
    )
    torch.testing.assert_close(tokens, mixed.flatten(2).transpose(1, 2))


def test_keeps_the_dtype():
    one = Combination(((0.5, 0.5),), ((),))
    assert one.apply([torch.ones(1, 2, 2, 2, dtype=torch.bfloat16)] * 2, []).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("predictions", "latents"),
    [
        ((), ()),
        (((),), ((),)),
        (((1.0,), (1.0, 2.0)), ((), ())),
        (((1.0,),), ((), ())),
        (((1.0,) * 9,), ((),)),
        (((2 * MOST,),), ((),)),
        (((float("nan"),),), ((),)),
    ],
)
def test_impossible_ones_are_refused(predictions, latents):
    with pytest.raises(ConfigurationError, match="combination"):
        Combination(predictions, latents)


@pytest.mark.parametrize("text", ["", "1", ";", "1;2;3;4", ";;1", "1;2;3|1;2", "1e3;", "1,;", "1;|", "nan;", "1;2|3"])
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigurationError, match="combination"):
        Combination.parse(text)
