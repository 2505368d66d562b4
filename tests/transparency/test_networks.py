"""The networks, padded colours, views and layers: published state dicts, exact identities, brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transparency_weights import PUBLISHED, tiny_decoder, tiny_encoder
from zoo import rand, vae

from diffusion_accel import ConfigurationError
from diffusion_accel.transparency.codec import decode_rgba, encode_rgba, refine_latents
from diffusion_accel.transparency.images import rgba_tensor, to_pil
from diffusion_accel.transparency.layers import recomposition_error, stack_layers
from diffusion_accel.transparency.modules import LatentTransparencyDecoder, LatentTransparencyEncoder
from diffusion_accel.transparency.rgba import checkerboard, composite, on_grey, padded_rgb, shrink, straight
from diffusion_accel.transparency.views import VIEWS, decode_views, turned, turned_back

EVERY_VIEW = [turn for turns in VIEWS.values() for turn in turns]


def image(height: int, width: int, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    made = rand(batch, 4, height, width, seed=seed).sigmoid()
    return made[:, :3], made[:, 3:]


# ------------------------------------------------------------------------------------------- networks
@pytest.mark.parametrize(
    ("cls", "key", "parameters"),
    [(LatentTransparencyDecoder, "decoder", 104_104_804), (LatentTransparencyEncoder, "encoder", 1_181_764)],
)
def test_full_size_networks_have_the_published_keys_and_shapes(cls: type, key: str, parameters: int) -> None:
    with torch.device("meta"):
        model = cls()
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == PUBLISHED[key]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.factor == 8


def test_an_untrained_encoder_leaves_the_mean_of_the_vae() -> None:
    model, frozen = LatentTransparencyEncoder(block_out_channels=(4, 8)), vae()
    rgb, alpha = image(16, 24)
    mean = frozen.encode(on_grey(rgb, alpha)).latent_dist.mean
    assert torch.equal(encode_rgba(frozen, model, rgb, alpha), mean)
    moved = encode_rgba(frozen, tiny_encoder(), rgb, alpha)
    assert not torch.equal(moved, mean)
    known = frozen.encode(on_grey(rgb, alpha)).latent_dist
    offset = tiny_encoder(offset_scale=1.0)(torch.cat([alpha, padded_rgb(rgb, alpha)], 1))
    assert torch.allclose(moved, known.mean + 3.0 * known.std * offset)
    with pytest.raises(ConfigurationError, match="multiples of 2 pixels, got 23x16"):
        encode_rgba(frozen, tiny_encoder(), rgb[..., 1:], alpha[..., 1:])


def test_clipping_leads_back_what_is_outside() -> None:
    from diffusion_accel.transparency.views import Clipped

    x = torch.tensor([-1.0, -1.0, 0.5, 0.5, 2.0, 2.0], requires_grad=True)
    gradient = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    made = Clipped.apply(x)
    assert torch.equal(made, x.clamp(0, 1))
    made.backward(gradient)
    # down the gradient: a value below 0 may only rise, one above 1 only fall
    assert x.grad is not None and x.grad.tolist() == [0, -1, 1, -1, 1, 0]


def test_refined_latents_are_read_better_and_each_by_itself() -> None:
    frozen, decoder = vae(), tiny_decoder()
    rgb, alpha = image(16, 24, batch=2)
    first = encode_rgba(frozen, tiny_encoder(), rgb, alpha).detach()

    def decode(z: torch.Tensor) -> torch.Tensor:
        return frozen.decode(z).sample

    def error(z: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            decoded = decode(z)
            made_rgb, made_alpha = decode_rgba(decoder, decoded, z, views=1)
        errors = (decoded - on_grey(rgb, alpha), 2 * (made_alpha - alpha), (made_rgb - rgb) * alpha)
        return torch.stack([e.square().flatten(1).mean(1) for e in errors]).sum(0)

    with torch.no_grad():
        made = [refine_latents(decode, decoder, first, rgb, alpha, steps) for steps in (0, 3, 10)]
    assert torch.equal(made[0], first) and not made[2].requires_grad
    assert (error(made[2]) < error(made[1])).all() and (error(made[1]) < error(first)).all()
    alone = refine_latents(decode, decoder, first[1:], rgb[1:], alpha[1:], 3)
    # Adam takes whole steps down gradients that are zero but for rounding, so single numbers may differ
    assert (alone - made[1][1:]).abs().median() < 1e-5
    assert all(p.grad is None for model in (frozen, decoder) for p in model.parameters())


def test_an_untrained_decoder_does_not_look_at_the_latents() -> None:
    torch.manual_seed(0)
    model = LatentTransparencyDecoder(block_out_channels=(8, 8, 16), latent_level=1, attention_levels=1)
    pixels = rand(1, 3, 16, 16).sigmoid()
    assert torch.equal(model(pixels, rand(1, 4, 8, 8)), model(pixels, rand(1, 4, 8, 8, seed=1)))
    filled = tiny_decoder()
    assert not torch.equal(filled(pixels, rand(1, 4, 8, 8)), filled(pixels, rand(1, 4, 8, 8, seed=1)))


def test_networks_survive_saving(tmp_path: Path) -> None:
    for model in (tiny_encoder(), tiny_decoder()):
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert loaded.config.latent_channels == 4
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="impossible"):
        LatentTransparencyDecoder(block_out_channels=(8, 8), latent_level=2)


# ------------------------------------------------------------------------------------------- views
@pytest.mark.parametrize("turn", EVERY_VIEW)
def test_every_turn_is_undone(turn: tuple[bool, int]) -> None:
    x = rand(2, 3, 4, 6)
    assert torch.equal(turned_back(turned(x, *turn), *turn), x)


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_a_decoder_that_copies_gives_back_its_input(views: int, size: tuple[int, int]) -> None:
    pixels = rand(2, 4, *size).sigmoid()
    assert torch.equal(decode_views(lambda p, z: p, pixels, rand(2, 4, *size), views), pixels)


def test_the_median_is_the_lower_middle_one_pixel_by_pixel() -> None:
    decoder, pixels, latents = tiny_decoder(), rand(1, 3, 8, 12).sigmoid(), rand(1, 4, 4, 6)
    each = []
    for flip in (False, True):
        for turns in range(4):
            a, b = (torch.rot90(x.flip(3) if flip else x, turns, (2, 3)) for x in (pixels, latents))
            made = torch.rot90(decoder(a, b).clip(0, 1), -turns, (2, 3))
            each.append(made.flip(3) if flip else made)
    expected = torch.stack(each).sort(0).values[3]
    assert torch.allclose(decode_views(decoder, pixels, latents, 8), expected, atol=1e-5)


@pytest.mark.parametrize("turn", VIEWS[8])
def test_eight_views_commute_with_turning_a_square(turn: tuple[bool, int]) -> None:
    decoder, pixels, latents = tiny_decoder(), rand(1, 3, 8, 8).sigmoid(), rand(1, 4, 4, 4)
    first = decode_views(decoder, turned(pixels, *turn), turned(latents, *turn))
    assert torch.allclose(first, turned(decode_views(decoder, pixels, latents), *turn), atol=1e-5)


def test_sizes_that_cannot_be_halved_are_padded_and_cut() -> None:
    decoder = tiny_decoder()
    whole = decode_rgba(decoder, rand(2, 3, 16, 20), rand(2, 4, 8, 10), views=1)
    plain = decoder((rand(2, 3, 16, 20) / 2 + 0.5).clamp(0, 1), rand(2, 4, 8, 10)).clamp(0, 1)
    assert torch.allclose(torch.cat([whole[1], whole[0]], 1), plain, atol=1e-5)
    odd, z = rand(1, 3, 18, 22), rand(1, 4, 9, 11)
    rgb, alpha = decode_rgba(decoder, odd, z, views=8)
    assert rgb.shape == (1, 3, 18, 22) and alpha.shape == (1, 1, 18, 22)
    padded = [torch.nn.functional.pad(x, (0, k, 0, k), mode="replicate") for x, k in ((odd, 2), (z, 1))]
    expected = decode_rgba(decoder, padded[0], padded[1], views=8)
    assert torch.allclose(rgb, expected[0][..., :18, :22], atol=1e-5)
    with pytest.raises(ConfigurationError, match="latents of 4x4 do not belong to an image of 22x18 pixels"):
        decode_rgba(decoder, odd, z[..., :4, :4])


# ------------------------------------------------------------------------------------------- colours
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_area_resampling_by_brute_force(size: int, width: int, data: st.DataObject) -> None:
    smaller = data.draw(st.integers(1, size))
    x = rand(1, 1, size, width)[0, 0].double()
    fine = x.repeat_interleave(smaller, 0)  # every new pixel is `size` of these rows
    expected = fine.view(smaller, size, width).mean(1)
    assert torch.allclose(shrink(x[None, None].float(), smaller, width)[0, 0].double(), expected, atol=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 10**6))
def test_padding_keeps_opaque_pixels_and_single_colours(height: int, width: int, seed: int) -> None:
    rgb, alpha = image(height, width, seed=seed)
    alpha = torch.where(alpha > 0.6, 1.0, torch.where(alpha < 0.4, 0.0, alpha))
    padded = padded_rgb(rgb, alpha)
    opaque = (alpha == 1).expand_as(rgb)
    assert torch.equal(padded[opaque], rgb[opaque])
    assert padded.isfinite().all() and padded.min() >= -1e-5 and padded.max() <= 1 + 1e-5
    colour = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1)
    alpha[..., 0, 0] = 1.0
    assert torch.allclose(padded_rgb(colour.expand_as(rgb), alpha), colour.expand_as(rgb), atol=1e-4)
    assert padded_rgb(rgb, torch.zeros_like(alpha)).isfinite().all()


def test_compositing_agrees_with_pil() -> None:
    rgb, alpha = image(9, 7)
    below, opaque = image(9, 7, seed=1)[0], torch.ones(1, 1, 9, 7)
    images = [to_pil(torch.cat(pair, 1))[0] for pair in ((below, opaque), (rgb, alpha))]
    expected = np.asarray(Image.alpha_composite(*images), np.float32) / 255
    made = composite(rgb, alpha, below)[0].permute(1, 2, 0).numpy()
    assert np.abs(made - expected[..., :3]).max() < 3 / 255
    assert torch.equal(composite(rgb, torch.ones_like(alpha), below), rgb)
    assert torch.equal(composite(rgb, torch.zeros_like(alpha), below), below)
    assert torch.allclose(straight(rgb * alpha, alpha), rgb, atol=1e-6)
    assert not straight(rgb, torch.zeros_like(alpha)).any()
    field = checkerboard(4, 6, 2)[0, 0]
    assert field[0].tolist() == pytest.approx([0.45, 0.45, 0.55, 0.55, 0.45, 0.45])
    assert field[2, 0] == pytest.approx(0.55)
    assert torch.allclose(rgba_tensor(images[1]), torch.cat([rgb, alpha], 1), atol=0.51 / 255)
    assert rgba_tensor(torch.zeros(1)) is None


# ------------------------------------------------------------------------------------------- layers
def test_layers_that_make_up_a_image_have_no_error() -> None:
    fg, bg = image(8, 8), (image(8, 8, seed=1)[0], torch.ones(1, 1, 8, 8))
    blend = composite(*fg, bg[0])
    assert recomposition_error([bg, fg], blend) < 1e-12
    wrong = recomposition_error([bg, (1 - fg[0], fg[1])], blend)
    assert wrong > 1e-3
    assert recomposition_error([bg, fg], picture=blend) < 1e-12  # its old name
    rgb, alpha = stack_layers([bg, fg])
    assert torch.allclose(rgb, blend, atol=1e-6) and torch.allclose(alpha, torch.ones_like(alpha))
    alone = stack_layers([fg])
    assert torch.allclose(alone[0], fg[0], atol=1e-5) and torch.equal(alone[1], fg[1])
    hidden = stack_layers([fg, bg])
    assert torch.allclose(hidden[0], bg[0], atol=1e-6)
    with pytest.raises(ValueError, match="no layers"):
        stack_layers([])


def test_gradients_flow_to_every_layer() -> None:
    parts = [t.clone().requires_grad_() for t in (*image(4, 4), *image(4, 4, seed=1))]
    recomposition_error([(parts[2], parts[3]), (parts[0], parts[1])], rand(1, 3, 4, 4)).sum().backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in parts)
