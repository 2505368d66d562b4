"""The size that a model was trained for: what its parts say goes before what its class of pipelines says."""

from __future__ import annotations

from typing import Any

import pytest
from zoo import ZOO
from zoo import flux as tiny_flux

from diffusion_accel.sizes import far_from_trained, trained_size


@pytest.fixture(scope="module")
def flux() -> Any:
    return tiny_flux()[0]


def test_the_denoiser_says_it() -> None:
    pipe = ZOO["sd"]()[0]
    assert trained_size(pipe) == (pipe.unet.config.sample_size * pipe.vae_scale_factor,) * 2


def test_a_transformer_that_does_not_say_it_has_a_vae_that_may(flux: Any) -> None:
    constant = flux.default_sample_size * flux.vae_scale_factor
    flux.vae.register_to_config(sample_size=32)  # what diffusers writes where nobody says anything
    assert trained_size(flux) == (constant, constant)
    flux.vae.register_to_config(sample_size=96)
    assert trained_size(flux) == (96, 96)
    assert far_from_trained(flux, None, None) is None
    assert far_from_trained(flux, 64, 64) == (
        "the model was trained for 96x96 pixels; at 64x64 it may not draw what the prompt says"
    )


def test_nothing_says_it(flux: Any) -> None:
    flux.vae.register_to_config(sample_size=32)
    flux.default_sample_size = None
    assert trained_size(flux) is None and far_from_trained(flux, 8, 8) is None
