"""Sizes and fidelities that are asked for: what is counted is what is written, and what was tried is told."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import TINY, Killed, sampler
from torch import nn

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.ptq.bits import Grid, allocate_by_rank
from diffusion_accel.quant.ptq.calibration import CalibrationSet
from diffusion_accel.quant.ptq.layer_ranks import layer_input_modification, z_score_shares
from diffusion_accel.quant.ptq.run import QuantizationRun, quantize_denoiser
from diffusion_accel.quant.ptq.settings import QuantizeSettings
from diffusion_accel.quant.ptq.sizes import parameters, stored_bytes

DYNAMIC = replace(TINY, inputs="dynamic", attention_bits=None, search=False)


def written(run: QuantizationRun, folder: Path) -> int:
    run.model.save_pretrained(folder)
    return (folder / "diffusion_pytorch_model.safetensors").stat().st_size


def specs_of(run: QuantizationRun) -> dict[str, Any]:
    return {name: layer.spec for name, layer in run.layers().items()}


# ---------------------------------------------------------------------- sizes
@pytest.mark.parametrize(
    "settings",
    [TINY, replace(TINY, activation_bits=4), replace(TINY, weight_bits=3, groups=(16,), activation_bits=None), DYNAMIC],
)
def test_what_a_checkpoint_will_take_is_what_it_takes(settings: QuantizeSettings, tmp_path: Path) -> None:
    run = quantize_denoiser(sampler(), settings, tmp_path / "work")
    specs, timesteps = specs_of(run), run.spec.timesteps
    size = written(run, tmp_path / "saved")
    run.restore()
    assert stored_bytes(run.denoiser, specs, timesteps) == size


@pytest.mark.slow
@pytest.mark.parametrize("settings", [TINY, DYNAMIC])
def test_a_size_ratio_is_kept_and_used(settings: QuantizeSettings, tmp_path: Path) -> None:
    errors = []
    for ratio in (0.16, 0.2, 0.26):
        run = quantize_denoiser(sampler(), replace(settings, size_ratio=ratio), tmp_path / f"{ratio} work")
        size, groups = written(run, tmp_path / f"{ratio}"), {s.weight_group for s in specs_of(run).values()}
        run.restore()
        share = size / (4 * parameters(run.denoiser))
        assert ratio - 0.005 < share <= ratio
        errors.append(run.validation["nearest, weights only"])
    assert errors == sorted(errors, reverse=True) and len(groups) > 1


def test_a_size_that_cannot_be_kept_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"size_ratio 0\.1 is not enough: the smallest checkpoint takes 0\."):
        quantize_denoiser(sampler(), replace(TINY, size_ratio=0.1), tmp_path / "work")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"size_ratio": 0.5, "bits_budget": 4.0}, "bits_budget and size_ratio both choose"),
        ({"size_ratio": 0.5, "min_psnr": 30.0}, "size_ratio and min_psnr both choose"),
        ({"size_ratio": 0.0}, "size_ratio must be a number from 0.01 to 1"),
        ({"min_psnr": math.nan}, "min_psnr must be a number from 1 to 100"),
        ({"min_psnr": 30.0, "softmax_bits": 8}, "leave softmax_bits out"),
        ({"allocation": "size"}, "allocation must be one of sensitivity, lim, zd"),
        ({"allocation": "lim"}, "allocation lim needs a bits_budget"),
        ({"allocation": "zd", "size_ratio": 0.5, "groups": (0, 32)}, "give one group"),
        ({"groups": (0, 32)}, "several sizes of groups need"),
    ],
)
def test_wishes_that_do_not_go_together(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        QuantizeSettings(**given)


# ---------------------------------------------------------------------- fidelity
SEARCH = replace(DYNAMIC, min_psnr=40.0, validation=2)


@pytest.mark.slow
def test_a_psnr_that_is_asked_for_is_searched(tmp_path: Path) -> None:
    run = quantize_denoiser(sampler(), SEARCH, tmp_path / "work")
    tried = {float(size): psnr for size, psnr in run.search["tried"].items()}
    taken = run.search["size_ratio"]
    assert tried[taken] >= 40 and run.search["images"] == 2
    below = [size for size in tried if size < taken]
    assert below and all(tried[size] < 40 for size in below)
    assert taken - max(below) == pytest.approx(0.002)
    size = written(run, tmp_path / "saved")
    run.restore()
    assert size / (4 * parameters(run.denoiser)) <= taken
    assert run.spec.recipe is not None and run.spec.recipe["search"] == run.search


@pytest.mark.slow
def test_an_interrupted_search_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    once = quantize_denoiser(sampler(), SEARCH, tmp_path / "once")

    count = itertools.count()

    def stop(what: str, *_: Any) -> None:
        if what.startswith("search") and next(count) == 2:
            raise Killed

    s = sampler()
    before = {k: v.clone() for k, v in s.pipe.unet.state_dict().items()}
    with pytest.raises(Killed):
        quantize_denoiser(s, SEARCH, tmp_path / "twice", progress=stop)
    assert all(torch.equal(v, before[k]) for k, v in s.pipe.unet.state_dict().items())
    assert len(json.loads((tmp_path / "twice" / "search.json").read_text())["tried"]) == 2
    told = list[str]()
    again = quantize_denoiser(s, SEARCH, tmp_path / "twice", progress=lambda what, *_: told.append(what))
    assert (
        again.search == once.search
        and len([t for t in told if t.startswith("search")]) == len(once.search["tried"]) - 2
    )
    assert all(torch.equal(v, once.model.state_dict()[k]) for k, v in again.model.state_dict().items())


@pytest.mark.slow
def test_a_psnr_that_cannot_be_kept_says_what_can(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"min_psnr 99 dB cannot be kept: the largest checkpoint \(.* keeps \d"
    ):
        quantize_denoiser(sampler(), replace(SEARCH, min_psnr=99.0, activation_bits=8), tmp_path)


# ---------------------------------------------------------------------- ranks
def test_ranks_give_the_first_layers_the_next_width() -> None:
    levels = {Grid(bits): 100 * bits for bits in (2, 3, 4)}
    costs = {"edge": {Grid(8): 800}, **dict.fromkeys("abcd", levels)}
    scores = {"edge": 0.0, "a": 0.1, "b": 0.4, "c": 0.3, "d": 0.2}
    found = allocate_by_rank(costs, scores, 800 + 4 * 300 + 250)
    assert {name: grid.bits for name, grid in found.items()} == {"edge": 8, "a": 3, "b": 4, "c": 4, "d": 3}
    assert {g.bits for g in allocate_by_rank(costs, scores, 10_000).values()} == {8, 4}


@pytest.mark.parametrize("name", ["lim", "zd"])
def test_an_allocation_by_ranks_keeps_the_size(name: str, tmp_path: Path) -> None:
    run = quantize_denoiser(sampler(), replace(DYNAMIC, size_ratio=0.2, allocation=name), tmp_path / "work")
    layers = {n: s for n, s in specs_of(run).items() if not n.startswith("conv_")}
    low, high = sorted({s.weight_bits for s in layers.values()})
    scores = run.scores
    worst = min(scores[n] for n, s in layers.items() if s.weight_bits == high)
    assert all(scores[n] <= worst for n, s in layers.items() if s.weight_bits == low)
    size = written(run, tmp_path / "saved")
    run.restore()
    assert size <= 0.2 * 4 * parameters(run.denoiser)


def test_lim_is_the_negative_similarity_of_the_nearest_module_that_keeps_the_shape(calibration: CalibrationSet) -> None:
    model = sampler().pipe.unet
    given: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda _m, args, out: given.setdefault(name, []).extend([args[0], out])

    module = model.get_submodule("down_blocks.0.resnets.0")
    assert isinstance(module.conv1, nn.Conv2d)
    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in ("down_blocks.0.resnets.0.conv1",)]
    rows = calibration.sample(0, 3, 0)
    found = layer_input_modification(model, [rows])
    for handle in handles:
        handle.remove()
    (before, after) = given["down_blocks.0.resnets.0.conv1"]
    a, b = before.flatten(1).double(), after.flatten(1).double()
    expected = -float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())
    assert found["down_blocks.0.resnets.0.conv1"] == pytest.approx(expected, abs=1e-5)
    assert all(-1 <= score <= 1 for score in found.values())
    assert not any(m._forward_hooks for m in model.modules())


def test_zd_is_the_share_above_a_standard_deviation() -> None:
    model = nn.Sequential(nn.Linear(4, 5, bias=False))
    weight = model[0].weight.detach()
    weight.zero_()
    weight[0, 0], weight[1, 1] = 3.0, 3.0
    assert z_score_shares(model) == {"0": pytest.approx(2 / 20)}
