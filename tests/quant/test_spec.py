"""What a spec of a layer allows."""

from __future__ import annotations

import pytest

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.spec import LayerSpec


def test_compact_grids_without_grids_by_channel_are_refused() -> None:
    for bad in ({"activation_bits": 4}, {"per_channel": True}):
        with pytest.raises(ConfigurationError, match="compact_grids needs"):
            LayerSpec(weight_bits=4, compact_grids=True, **bad)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="zero_margin needs"):
            LayerSpec(weight_bits=4, zero_margin=8, **bad)  # type: ignore[arg-type]
    for margin in (-1, 65, 1.0):
        with pytest.raises(ConfigurationError, match="zero_margin must be 0 to 64"):
            LayerSpec(weight_bits=4, activation_bits=4, per_channel=True, zero_margin=margin)  # type: ignore[arg-type]


def test_bits_out_of_range_are_refused() -> None:
    for bad in ({"weight_bits": 1}, {"weight_bits": 9}, {"weight_bits": 4, "activation_bits": 17}):
        with pytest.raises(ConfigurationError, match="must be"):
            LayerSpec(**bad)
