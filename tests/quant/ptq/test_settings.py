"""Settings: what is allowed, and how bits are written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.ptq.finetune import FinetuneSettings
from diffusion_accel.quant.ptq.ranges import RangeSettings
from diffusion_accel.quant.ptq.reconstruct import RoundingSettings
from diffusion_accel.quant.ptq.settings import QuantizeSettings, parse_bits, settings_of


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        *((FinetuneSettings, name, v) for name in ("rate", "scale_rate") for v in (float("nan"), 1e300, 0, True, "1")),
        *((FinetuneSettings, "epochs", v) for v in (-1, 10**30, 1.5)),
        (FinetuneSettings, "time_epochs", (1, 10**30, 1)),
        (FinetuneSettings, "rows", 0),
        (RoundingSettings, "iterations", 10**30),
        (RoundingSettings, "beta", (20.0, float("inf"))),
        (RangeSettings, "momentum", float("nan")),
        (RangeSettings, "percentiles", (99.0, 101.0)),
        (QuantizeSettings, "seed", -1),
    ],
)
def test_numbers_of_settings_have_bounds(cls: Any, name: str, value: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"{name.replace('_', ' ')}.* must be a (whole )?number from .*, got "
    ):
        cls(**{name: value})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bits_budgt": 3}, "QuantizeSettings: unknown argument bits_budgt; did you mean bits_budget?"),
        ({"bits_budget": "3"}, "bits_budget must be between 2 and 8"),
        ({"weight_bits": "8"}, "weight_bits must be 2 to 8"),
        ({"rounding": 3}, "rounding must be RoundingSettings or None, got 3"),
        ({"finetune": "none"}, "finetune must be FinetuneSettings or None"),
        ({"split": "no"}, "split must be true or false"),
        ({"per_channel": 1}, "per_channel must be true or false"),
        ({"buckets": "a"}, "buckets must be at least 1"),
        ({"sensitive": True}, "sensitive must be a share between 0 and 1"),
    ],
)
def test_what_is_no_setting_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        QuantizeSettings(**values)
    with pytest.raises(ConfigurationError, match="settings must be QuantizeSettings, got 3"):
        settings_of("w4", 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "bits"), [("w8a8", (8, 8)), ("W4A4", (4, 4)), ("w4", (4, None)), ("w8a16", (8, None)), ("w3a6", (3, 6))]
)
def test_bits_as_text(text: str, bits: tuple[int, int | None]) -> None:
    assert parse_bits(text) == bits


@pytest.mark.parametrize("text", ["", "8", "w", "w9a8", "w1", "w4a1", "w4a40", "a8w4", "w4 a8"])
def test_bits_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_bits(text)


def test_how_many_buckets() -> None:
    """16 where each channel has a grid, 25 elsewhere; what is asked for is used."""
    for bits, count in ((8, 25), (6, 25), (5, 16), (4, 16), (None, 25)):
        settings = QuantizeSettings(activation_bits=bits)
        assert settings.bucket_count == settings.to_dict()["buckets"] == count
        assert replace(settings, buckets=20).bucket_count == 20
    assert QuantizeSettings(per_channel=True).bucket_count == 16
    assert QuantizeSettings(activation_bits=4, per_channel=False).bucket_count == 25
