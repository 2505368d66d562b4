"""`generate` with several ControlNets: the bits of diffusers, drawn again from the image, wrong numbers refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import call
from diffusers import StableDiffusionControlNetImg2ImgPipeline, StableDiffusionControlNetPipeline
from model_folder import write_folder
from PIL import Image
from zoo import controlnet_model

from diffusion_accel.pipelines.loading import load_pipeline

SMALL = ("--steps", 3, "--seed", 1, "--device", "cpu", "-q")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, three ControlNets, and an image for each; that of b has another size."""
    place = tmp_path_factory.mktemp("model")
    write_folder(place / "model")
    for number, name in enumerate("abc"):
        controlnet_model(number).save_pretrained(place / name)
        side = 16 if name != "b" else 32
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{name}.png")
    return place


def controlled(folder: Path, names: str, *more: Any) -> tuple[Any, ...]:
    each = [("--controlnet", folder / name, "--control-image", folder / f"{name}.png") for name in names]
    return ("generate", "red", "-m", folder / "model", *(word for words in each for word in words), *SMALL, *more)


def by_hand(folder: Path, names: str, kind: Any = StableDiffusionControlNetPipeline, **arguments: Any) -> Any:
    """What diffusers draws with its own classes."""
    nets = [controlnet_model("abc".index(name)) for name in names]
    parts = load_pipeline(str(folder / "model")).components
    pipe = kind(**parts, controlnet=nets if len(nets) > 1 else nets[0], requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    opened = [Image.open(folder / f"{name}.png").convert("RGB") for name in names]
    images = [one if one.size == (16, 16) else one.resize((16, 16), Image.Resampling.LANCZOS) for one in opened]
    given = images if len(images) > 1 else images[0]
    name = "control_image" if "image" in arguments else "image"
    generator = torch.Generator().manual_seed(1)
    called = {"num_inference_steps": 3, "generator": generator, name: given, **arguments}
    return np.asarray(pipe("red", **called).images[0])


def settings_in(file: Path) -> dict[str, Any]:
    with Image.open(file) as image:
        found: dict[str, Any] = json.loads(image.text["diffusion_accel"])["settings"]
        return found


@pytest.mark.parametrize(
    ("more", "arguments"),
    [
        ((), {}),
        (("--controlnet-conditioning-scale", 0.5), {"controlnet_conditioning_scale": 0.5}),
        (
            ("--controlnet-conditioning-scale", 1, "--controlnet-conditioning-scale", 0.25),
            {"controlnet_conditioning_scale": [1.0, 0.25]},
        ),
        (
            ("--control-guidance-start", 0, "--control-guidance-start", 0.4, "--control-guidance-end", 0.7),
            {"control_guidance_start": [0.0, 0.4], "control_guidance_end": 0.7},
        ),
        (
            ("--control-guidance-end", 0.4, "--control-guidance-end", 1),
            {"control_guidance_end": [0.4, 1.0]},
        ),
    ],
    ids=["plain", "one scale", "a scale each", "starts", "ends"],
)
def test_two_as_diffusers_draws_them_and_again(
    more: tuple[Any, ...],
    arguments: dict[str, Any],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, again = folder / "first.png", tmp_path / "again.png"
    code, _, err = call(capsys, *controlled(folder, "ab", *more, "--overwrite", "-o", first))
    assert (code, err) == (0, "")
    assert np.array_equal(np.asarray(Image.open(first)), by_hand(folder, "ab", **arguments))
    kept = settings_in(first)
    assert kept["controlnet"] == ["a", "b"] and kept["control_image"] == ["a.png", "b.png"]
    assert {key: kept[key] for key in arguments} == arguments
    code, _, err = call(capsys, "generate", "--from", first, "-m", folder / "model", "-q", "-o", again)
    assert (code, err) == (0, "")
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))
    kept["controlnet"] = kept["control_image"] = None
    assert settings_in(again) | {"controlnet": None, "control_image": None} == kept


def test_the_order_counts_and_each_has_its_image(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = {}
    for names in ("ac", "ca", "aac"):
        file, scales = tmp_path / f"{names}.png", [("--controlnet-conditioning-scale", 1 / (k + 1)) for k in range(3)]
        given = [word for words in scales[: len(names)] for word in words]
        assert call(capsys, *controlled(folder, names, *given, "-o", file))[0] == 0
        drawn[names] = np.asarray(Image.open(file))
        wanted = by_hand(folder, names, controlnet_conditioning_scale=[1 / (k + 1) for k in range(len(names))])
        assert np.array_equal(drawn[names], wanted)
    assert not np.array_equal(drawn["ac"], drawn["ca"])


def test_from_an_image_with_features_and_in_a_configuration_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ("--image", folder / "c.png", "--strength", 0.8)
    wanted = by_hand(
        folder,
        "ab",
        StableDiffusionControlNetImg2ImgPipeline,
        image=Image.open(folder / "c.png"),
        strength=0.8,
        num_inference_steps=4,
        controlnet_conditioning_scale=[1.0, 0.5],
    )
    config = {
        "controlnet": [str(folder / "a"), str(folder / "b")],
        "control-image": [str(folder / "a.png"), str(folder / "b.png")],
        "controlnet-conditioning-scale": [1, 0.5],
        "encoder_reuse": {"schedule": "all"},
        "controlnet_parallel": {},
    }
    (tmp_path / "a.json").write_text(json.dumps(config))
    given = ("red", "-m", folder / "model", *start, "--config", tmp_path / "a.json", *SMALL, "--steps", 4)
    code, _, err = call(capsys, "generate", *given, "-o", tmp_path / "a.png")
    assert (code, err) == (0, "")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), wanted)


def test_one_stays_as_it_was(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale = ("--controlnet-conditioning-scale", 0.5)
    code, _, err = call(capsys, *controlled(folder, "a", *scale, "-o", tmp_path / "a.png"))
    assert (code, err) == (0, "")
    wanted = by_hand(folder, "a", controlnet_conditioning_scale=0.5)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), wanted)
    kept = settings_in(tmp_path / "a.png")
    assert (kept["controlnet"], kept["control_image"], kept["controlnet_conditioning_scale"]) == ("a", "a.png", 0.5)
    assert "control_guidance_start" not in kept


@pytest.mark.parametrize("names", ["a", "ab"])
def test_a_folder_that_has_them(
    names: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """Images are for its own ControlNets where no others are given; without any it is refused before it is loaded."""
    nets = [folder / name for name in names]
    load_pipeline(str(folder / "model"), controlnet=nets).save_pretrained(tmp_path / "own")
    own = ("generate", "red", "-m", tmp_path / "own", *SMALL)
    images = [word for name in names for word in ("--control-image", folder / f"{name}.png")]
    code, _, err = call(capsys, *own, *images, "-o", tmp_path / "a.png")
    assert (code, err) == (0, "")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), by_hand(folder, names))
    other = ("--controlnet", folder / "c", "--control-image", folder / "c.png")
    code, _, err = call(capsys, *own, *other, "-o", tmp_path / "c.png")
    assert (code, err) == (0, "")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "c.png")), by_hand(folder, "c"))
    request.getfixturevalue("no_model")
    more = ("--control-image", folder / "c.png")
    has = "1 ControlNet" if names == "a" else "2 ControlNets"
    for given, words in (
        ((), f"--control-image is needed: own has {has}"),
        ([*images, *more], f"must be given once for each ControlNet of own, in their order: {len(names)}, got "),
        (("--distribute", "prompts"), f"--control-image is needed: own has {has}"),
    ):
        code, out, err = call(capsys, *own, *given, "-o", tmp_path / "new")
        assert code == 2 and words in err and err.count("\n") == 1 and not out, err


def test_whole_paths_of_several(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert call(capsys, *controlled(Path(), "ac", "--paths", "-o", first))[0] == 0
    kept = settings_in(first)
    assert kept["controlnet"] == [str(folder / "a"), str(folder / "c")]
    assert kept["control_image"] == [str(folder / "a.png"), str(folder / "c.png")]
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "generate", "--from", first, "--paths", "-o", again, "-q")
    assert (code, err) == (0, "")
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))


def test_a_bulk_of_prompts_goes_on_with_the_same_ones_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bulk = ("--distribute", "prompts", "-o", tmp_path / "bulk")
    for _ in range(2):
        code, _, err = call(capsys, *controlled(folder, "ac", *bulk))
        assert (code, err) == (0, "")
    code, _, err = call(capsys, *controlled(folder, "ca", *bulk))
    assert code == 2 and "was begun with other settings (controlnet)" in err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ("--controlnet", "a", "--controlnet", "b", "--control-image", "a.png"),
            "each --controlnet, in their order: 2, ",
        ),
        (("--controlnet", "a", "--control-image", "a.png", "--control-image", "b.png"), "order: 1, got 2"),
        (
            ("ab", *("--controlnet-conditioning-scale", 1) * 3),
            "--controlnet-conditioning-scale has 3 values, and there ",
        ),
        (("ab", *("--control-guidance-start", 0) * 3), "are 2 ControlNets; give one for all, or one for each"),
        (("a", *("--control-guidance-end", 1) * 2), "has 2 values, and there is 1 ControlNet;"),
        (("ab", "--controlnet-conditioning-scale", 1, "--controlnet-conditioning-scale", 11), "at most 10, got 11"),
        (
            ("ab", "--control-guidance-start", 0.2, "--control-guidance-end", 1, "--control-guidance-end", 0.2),
            "--control-guidance-start must be below --control-guidance-end, got 0.2 and 0.2",
        ),
        (("--controlnet", "a", "--controlnet", "", "--control-image", "a.png"), "controlnet is empty"),
        (("ab", "--config", "odd"), "controlnet must be a text, got ['a']"),
        (("ab", "--config", "none"), "controlnet must be one, or one for each ControlNet, got []"),
        (("ab", "--config", "words"), "controlnet-conditioning-scale must be a number, got 'x'"),
        (
            ("--controlnet", "a", "--controlnet", "b", *("--control-image", "a.png", "--control-image", "d.png")),
            "no such file: d.png",
        ),
    ],
)
def test_wrong_numbers_are_refused_before_a_model_is_loaded(
    given: tuple[Any, ...],
    words: str,
    folder: Path,
    no_model: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    config = {"odd": {"controlnet": [["a"], "b"]}, "none": {"controlnet": []}}
    config["words"] = {"controlnet_conditioning_scale": ["x", 1]}
    first, *more = given
    if more[:1] == ["--config"]:
        file = tmp_path / "c.json"
        file.write_text(json.dumps(config[more[1]]))
        words_given = ("generate", "red", "--config", file)
    elif first in ("a", "ab"):
        words_given = controlled(folder, first, *more)
    else:
        words_given = ("generate", "red", *given)
    code, out, err = call(capsys, *words_given, "-o", tmp_path / "x.png")
    assert code == 2 and words in err and err.count("\n") == 1 and not out, err


def test_an_image_names_no_more_than_what_lies_beside_it(
    folder: Path, no_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusion_accel.image_files import save_image

    data = {"prompt": "red", "seed": 1, "model": "sticker", "features": {}}
    for nets, words in (
        (["a", "/etc"], "leaves the image's folder"),
        (["a", "owner/net"], "there is no 'owner/net' beside it; give --controlnet"),
        (["a"] * 65, "65 of controlnet; at most 64 are taken from an image"),
        ([["a"]], "controlnet must be a text"),
    ):
        file = folder / "hostile.png"
        settings = {"controlnet": nets, "control_image": ["a.png"] * len(nets)}
        save_image(Image.new("RGB", (16, 16)), file, "text", data | {"settings": settings})
        code, out, err = call(capsys, "generate", "--from", file, "-o", tmp_path / "x.png")
        assert code == 2 and words in err and err.count("\n") == 1 and not out, err
