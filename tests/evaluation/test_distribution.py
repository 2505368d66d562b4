"""Distances between distributions against scipy and brute force, and the classifier that ships."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from diffusion_accel.errors import ModelLoadError
from diffusion_accel.evaluation import classifier, prompts
from diffusion_accel.evaluation.distribution import frechet_distance, precision_recall, retrieval
from diffusion_accel.evaluation.drawing import drawing_quality


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_against_scipy() -> None:
    mix = rand(6, 6, seed=2)
    first, second = rand(50, 6) @ mix + 1, rand(70, 6, seed=1) * 2
    a, b = first.double().numpy(), second.double().numpy()
    one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two - 2 * np.real(sqrtm(one @ two)))
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_known_gaussians() -> None:
    first = rand(400, 3)
    assert frechet_distance(first, first) < 1e-9
    assert frechet_distance(first, first + torch.tensor([3.0, 0, 4])) == pytest.approx(25, rel=1e-5)
    scaled = frechet_distance(first - first.mean(0), 3 * (first - first.mean(0)))
    assert scaled == pytest.approx(4 * float(torch.cov(first.T).trace()), rel=1e-4)
    few = frechet_distance(rand(5, 8), rand(5, 8, seed=1))
    assert np.isfinite(few) and few > 0, "singular covariances are no error"


def brute_share(centres: torch.Tensor, points: torch.Tensor, k: int) -> float:
    inside = 0
    for point in points:
        for i, centre in enumerate(centres):
            others = sorted(float((centre - other).norm()) for j, other in enumerate(centres) if j != i)
            if float((point - centre).norm()) <= others[min(k, len(others)) - 1] + 1e-6:
                inside += 1
                break
    return inside / len(points)


@settings(max_examples=15, deadline=None)
@given(st.integers(5, 12), st.integers(5, 12), st.integers(0, 1000))
def test_precision_and_recall_against_brute_force(n: int, m: int, seed: int) -> None:
    real, made = rand(n, 3, seed=seed), rand(m, 3, seed=seed + 1) * 1.5
    precision, recall = precision_recall(real, made)
    assert precision == pytest.approx(brute_share(real, made, 3))
    assert recall == pytest.approx(brute_share(made, real, 3))
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, made + 1000)[0] == 0


def test_retrieval() -> None:
    real = torch.eye(4)
    names, kinds = ["apple", "apple", "pear", "plum"], ["flat", "3d", "flat", "3d"]
    found = retrieval(real * 5, names, kinds, real, names, kinds)
    assert found == {"n": 4} | dict.fromkeys(["style_top1", "style_top5", "any_top1", "any_top5", "nearest_style"], 1.0)
    made = torch.tensor([[0.9, 1.0, 0, 0]])  # asked for a flat apple, nearest to the 3d one
    one = retrieval(made, ["apple"], ["flat"], real, names, kinds)
    assert (one["any_top1"], one["style_top1"], one["nearest_style"]) == (1.0, 1.0, 0.0)
    other = retrieval(made, ["plum"], ["3d"], real, names, kinds)
    assert (other["any_top1"], other["any_top5"], other["style_top1"], other["style_top5"]) == (0.0, 1.0, 0.0, 1.0)


# ------------------------------------------------------------------------------------------- what ships
def test_the_classifier_that_ships_knows_degraded_images() -> None:
    """Calibration at small scale: noise and blur move the features further than a small shift does."""
    from diffusers import AutoencoderKL

    from diffusion_accel.model_files.names import EMBEDDED

    model = classifier.load_classifier()
    asked, real = prompts.embedded_reference()
    assert len(asked.captions) == len(real) == len(asked.splits) and set(asked.splits) == {"train", "heldout", ""}
    assert all(style in prompts.STICKER_STYLES for style in real.styles)
    vae = AutoencoderKL.from_pretrained(EMBEDDED["sticker"].path / "vae")
    images = F.interpolate(rand(32, 3, 6, 6), 96, mode="bicubic").clamp(-1, 1)
    base = classifier.extract(model, images)
    assert base.shape == (32, classifier.FEATURES)
    torch.testing.assert_close(classifier.extract(model, images[:3]), base[:3], rtol=1e-4, atol=1e-4)
    shifted = classifier.extract(model, images.roll(1, -1))
    noisy = classifier.extract(model, (images + 0.5 * rand(32, 3, 96, 96, seed=1)).clamp(-1, 1))
    assert frechet_distance(base, shifted) < frechet_distance(base, noisy)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images[:4]).latent_dist.mean).sample
    assert classifier.extract(model, decoded).isfinite().all()
    assert classifier.extract(model, F.interpolate(images[:2], 128)).shape == (2, classifier.FEATURES)


def test_real_images_retrieve_themselves() -> None:
    asked, real = prompts.embedded_reference()
    chosen = asked.choose("heldout", 40)
    assert chosen == asked.choose("heldout", 40) and all(asked.splits[i] == "heldout" for i in chosen)
    values = drawing_quality(real.values[chosen], chosen, asked, real)
    assert values["frechet"] == 0 and values["precision"] == values["recall"] == 1
    assert values["retrieval"]["style_top1"] == values["retrieval"]["any_top1"] == 1


def test_a_broken_classifier_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="holds no sticker classifier"):
        classifier.load_classifier(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps({"concept": ["a"], "group": ["b"], "style": ["c"]}))
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ModelLoadError, match="holds no sticker classifier"):
        classifier.load_classifier(tmp_path)
    with pytest.raises(ModelLoadError, match="holds no reference features"):
        classifier.load_reference(tmp_path)
