"""Which channels a timestep uses: published numbers, windows, the random baseline."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import EVERY, masks

from diffusion_accel import ConfigurationError, TaskRouting
from diffusion_accel.routing import Recipe
from diffusion_accel.routing.masks import active_channels, channel_mask, offsets, positions, window


def test_published_numbers() -> None:
    recipe = Recipe()
    first = offsets(positions(EVERY, recipe), 1024, recipe)
    assert active_channels(1024, 0.8) == 819
    assert [int(first[t]) for t in (0, 250, 500, 750, 999)] == [0, 1, 13, 65, 205]
    table = masks(1024)
    assert len(torch.unique(table, dim=0)) == 206
    assert all(torch.equal(table[0], row) for row in table[:223]) and not torch.equal(table[0], table[223])
    wide = offsets(positions(EVERY, recipe), 1152, recipe)
    assert active_channels(1152, 0.8) == 921 and int(wide[999]) == 231
    assert int((wide > 0).nonzero()[0]) == 216


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.floats(0.05, 1), st.floats(0.1, 8), st.sampled_from(["index", "flow", "unit"]))
def test_windows_are_whole_and_move_up(channels: int, beta: float, alpha: float, time: str) -> None:
    recipe = Recipe(beta=beta, alpha=alpha, time=time)
    top = {"index": 999, "flow": 1000, "unit": 1}[time]
    timesteps = torch.linspace(0, top, 101, dtype=torch.float64)
    first, active = offsets(positions(timesteps, recipe), channels, recipe), active_channels(channels, beta)
    assert first[0] == 0 and first[-1] == channels - active and (first.diff() >= 0).all()
    table = masks(channels, recipe, timesteps)
    assert (table.sum(1) == active).all()
    starts = table.float().argmax(1)
    assert torch.equal(starts.double(), first), "the window is one piece"
    assert table[0, 0] and table[-1, -1]
    if alpha >= 1 and active >= 2:
        assert table.any(0).all() or first.diff().max() > active


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(beta=0.37, alpha=1.3), Recipe(beta=1.0)])
def test_one_position_on_the_host_gives_the_same_windows(recipe: Recipe) -> None:
    for channels in (1, 7, 64, 320, 1152):
        first = offsets(positions(EVERY, recipe), channels, recipe).long().tolist()
        got = [window(float(p), channels, recipe) for p in positions(EVERY, recipe)]
        assert got == [(s, s + active_channels(channels, recipe.beta)) for s in first]


def test_all_channels_are_used_and_high_noise_moves_fast() -> None:
    recipe = Recipe()
    assert masks(64).any(0).all()
    moved = offsets(positions(EVERY, recipe), 1024, recipe).diff()
    assert moved[750:].sum() > moved[500:750].sum() > moved[250:500].sum() > moved[:250].sum()


def test_random_baseline() -> None:
    recipe = Recipe(kind="random")
    table = masks(64, recipe)
    assert (table.sum(1) == active_channels(64, 0.8)).all()
    assert torch.equal(table, masks(64, recipe)), "not stored, and yet always the same"
    assert len(torch.unique(table, dim=0)) == 1000
    assert not torch.equal(table, channel_mask(positions(EVERY, recipe), 64, recipe, block=1))
    assert not torch.equal(table, masks(64, Recipe(kind="random", seed=1)))
    share = table.float().mean(0)
    assert share.min() > 0.7 and share.max() < 0.9
    agree = (table[1:] == table[:-1]).float().mean()
    assert abs(agree - (0.797**2 + 0.203**2)) < 0.02, "neighbouring timesteps are independent"


@pytest.mark.parametrize(
    "values", [{"beta": 0.0}, {"beta": 1.1}, {"beta": float("nan")}, {"alpha": 0.0}, {"alpha": float("inf")}]
)
def test_impossible_values_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="task.routing.* must be"):
        TaskRouting(**values)
    with pytest.raises(ConfigurationError, match="one of window, random"):
        TaskRouting(kind="other")
    with pytest.raises(ConfigurationError, match="not a recipe"):
        Recipe.from_dict({"gamma": 1})
