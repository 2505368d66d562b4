"""Fits of combinations: least squares around a centre, and what decides how finely."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_accel.combination import MOST
from diffusion_accel.tuning.fits import (
    MOST_CHANNELS,
    RIDGES,
    Moments,
    by_channel,
    combination,
    fitted,
    fitted_moments,
    mixed,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(count: int, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    return [noise(*shape, seed=100 * seed + k) for k in range(count)]


def brute(columns: torch.Tensor, target: torch.Tensor, centre: torch.Tensor, ridge: float) -> torch.Tensor:
    """min ‖columns·w − target‖² + ridge · mean(diag) · ‖w − centre‖², as an ordinary least-squares problem: (K,)."""
    columns, target = columns.double(), target.double()
    size = ridge * columns.pow(2).sum(0).mean()
    rows = torch.cat([columns, size.sqrt() * torch.eye(columns.shape[1], dtype=torch.float64)])
    goal = torch.cat([target, size.sqrt() * centre.double()])
    return torch.linalg.lstsq(rows, goal[:, None], driver="gelsd").solution[:, 0]


@pytest.mark.parametrize("ridge", [1e-7, 1e-3, 10.0])
@pytest.mark.parametrize("shared", [True, False])
def test_weights_are_the_least_squares_around_the_centre(ridge: float, shared: bool) -> None:
    parts, target = features(3, 5, 2, 3, 3), noise(5, 2, 3, 3, seed=9)
    centre = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
    found = Moments.of(parts, target).summed(torch.arange(5), shared).solved(centre, ridge)
    assert found.shape == (1 if shared else 2, 3)
    for c in range(len(found)):
        some = (lambda t: t.flatten()) if shared else (lambda t, c=c: t[:, c].flatten())  # type: ignore[misc]
        wanted = brute(torch.stack([some(p) for p in parts], 1), some(target), centre, ridge)
        torch.testing.assert_close(found[c], wanted, rtol=1e-6, atol=1e-8)


def test_moments_give_the_error_of_any_weights_and_of_some_images() -> None:
    parts, target = features(2, 4, 3, 2, 2), noise(4, 3, 2, 2, seed=5)
    weights, some = noise(3, 2, seed=7).double(), torch.tensor([1, 3])
    error = Moments.of(parts, target).summed(some, False).error(weights)
    made = sum(weights[:, k].view(1, 3, 1, 1) * parts[k].double() for k in range(2))
    torch.testing.assert_close(error, (made - target.double())[some].pow(2).sum())
    together = Moments.of([p[some] for p in parts], target[some]).summed(torch.arange(2), True)
    apart = Moments.of(parts, target).summed(some, True)
    torch.testing.assert_close(together.gram, apart.gram)
    torch.testing.assert_close(together.aims, apart.aims)


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 6, 3), (4, 3, 2, 2, 2)])
def test_channels_are_where_the_latents_have_them(shape: tuple[int, ...]) -> None:
    parts = features(2, *shape)
    weights = torch.stack([torch.linspace(0.5, 1.5, 3), torch.linspace(-1, 1, 3)], 1).double()
    target = mixed(weights, parts)
    torch.testing.assert_close(fitted(parts, target, [0.0, 0.0]), weights, rtol=1e-4, atol=1e-4)
    assert by_channel(target).shape[:2] == (4, 3)
    made = combination(weights, 1, len(parts) - 1).apply(parts[:1], parts[1:])
    torch.testing.assert_close(made, target, rtol=1e-5, atol=1e-5)


def test_few_images_alike_and_many_channels_share_their_weights() -> None:
    target = noise(4, 3, 4, 4, seed=8) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    parts = [target / torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)]
    assert fitted(parts, target, [1.0]).shape == (3, 1)
    assert fitted(parts, target, [1.0], alike=True).shape == (1, 1)
    assert fitted([p[:3] for p in parts], target[:3], [1.0]).shape == (1, 1)
    many = noise(4, MOST_CHANNELS + 1, 2, 2)
    assert fitted([many], many, [0.0]).shape == (1, 1)


def test_channels_that_are_alike_in_truth_share_their_weights() -> None:
    """Weights of their own for each of many channels and few values hold for those images only."""
    parts = features(4, 4, 60, 2, 1)
    target = parts[0] + 3 * noise(4, 60, 2, 1, seed=50)
    assert fitted(parts, target, [1.0, 0.0, 0.0, 0.0]).shape == (1, 4)


@given(
    images=st.integers(4, 6), channels=st.integers(1, 3), count=st.integers(1, 4), noisy=st.floats(0, 3),
    seed=st.integers(0, 30),
)  # fmt: skip
@settings(max_examples=25)
def test_what_is_chosen_is_the_best_of_all_choices_on_the_other_half(
    images: int, channels: int, count: int, noisy: float, seed: int
) -> None:
    parts = features(count, images, channels, 2, 2, seed=seed)
    target = parts[0] + noisy * noise(images, channels, 2, 2, seed=999 + seed)
    plain, middle = Moments.of(parts, target), torch.tensor([1.0] + [0.0] * (count - 1), dtype=torch.float64)
    moments = plain.evened(middle)
    losses = {}
    for shared in (False, True):
        for ridge in RIDGES:
            losses[shared, ridge] = sum(
                float(
                    moments.summed(torch.arange(1 - k, images, 2), False).error(
                        moments.summed(torch.arange(k, images, 2), shared).solved(middle, ridge)
                    )
                )
                for k in (0, 1)
            )
    best = min(losses, key=losses.__getitem__)
    found = fitted_moments(plain, middle)
    if losses[best] <= float(moments.summed(torch.arange(images), False).error(middle[None])):
        torch.testing.assert_close(found, moments.summed(torch.arange(images), best[0]).solved(middle, best[1]))
    else:
        torch.testing.assert_close(found, middle[None])


def test_an_image_that_nothing_can_help_does_not_decide_for_the_others() -> None:
    """Seven images follow one rule, one is noise a hundred times as large."""
    parts = features(2, 8, 1, 6, 6)
    target = 0.7 * parts[0] + 0.3 * parts[1]
    target[3] = 100 * noise(1, 6, 6, seed=5)
    found = fitted(parts, target, [1.0, 0.0])
    torch.testing.assert_close(found, torch.tensor([[0.7, 0.3]], dtype=torch.float64), atol=0.02, rtol=0)
    plain = Moments.of(parts, target).summed(torch.arange(8), True).solved(torch.tensor([1.0, 0.0]).double(), RIDGES[0])
    assert float((plain - torch.tensor([[0.7, 0.3]]).double()).abs().max()) > 0.3


def test_errors_are_those_of_each_image() -> None:
    parts = features(3, 5, 2, 3, 3)
    target = noise(5, 2, 3, 3, seed=9)
    weights = torch.tensor([[0.5, 0.2, 0.1], [1.0, -0.3, 0.0]], dtype=torch.float64)
    found = Moments.of(parts, target).errors(weights)
    torch.testing.assert_close(found.float(), (mixed(weights, parts) - target).pow(2).flatten(1).sum(1))


def test_what_the_images_do_not_support_stays_at_the_centre() -> None:
    parts = features(4, 4, 1, 1, 1)
    target = parts[0] + 5 * noise(4, 1, 1, 1, seed=77)
    assert fitted(parts, target, [1.0, 0.0, 0.0, 0.0]).tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_nothing_is_fitted_to_features_that_are_nothing_and_weights_are_bounded() -> None:
    nothing = torch.zeros(4, 2, 2, 2)
    assert torch.isfinite(fitted([nothing, nothing], noise(4, 2, 2, 2), [1.0, 0.0])).all()
    tiny = 1e-8 * noise(4, 1, 8, 8)
    assert float(fitted([tiny], noise(4, 1, 8, 8) * 0 + tiny * 1e9, [0.0]).abs().max()) <= MOST
