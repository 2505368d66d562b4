"""`generate --from`: the same pixels from an image's own metadata, which may come from anybody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import call
from model_folder import write_folder
from PIL import Image

from diffusion_accel import AcceleratedPipeline
from diffusion_accel.cli.from_image import read_again
from diffusion_accel.errors import AccelerationError
from diffusion_accel.image_files import save_image

SMALL = ("--width", 16, "--height", 16, "--steps", 3)
DATA: dict[str, Any] = {"prompt": "red apple", "seed": 1, "model": "sticker", "settings": {"steps": 2}, "features": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and the same with a recipe."""
    place = tmp_path_factory.mktemp("model")
    write_folder(place / "plain")
    pipe: Any = AcceleratedPipeline.from_pretrained(str(place / "plain"), reuse="hold:2", scheduler="euler")
    pipe.save_pretrained(place / "fast")
    return place


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def written(path: Path, **changes: Any) -> Path:
    save_image(Image.new("RGB", (16, 16)), path, "text", DATA | changes)
    return path


@pytest.mark.sampled(3)
@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_the_same_pixels_again(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (tmp_path / f"{name}{suffix}" for name in ("first", "again", "other"))
    given = ("red apple, 3d style", "--negative-prompt", "grey", "--reuse", "hold:2", "--scheduler", "ddim,trailing")
    assert call(capsys, "generate", *given, "--steps", 4, "--guidance-scale", 2, "-q", "-o", first)[0] == 0
    code, _, err = call(capsys, "generate", "--from", first, "-o", again)
    assert (code, err) == (0, "") and pixels(first) == pixels(again)
    code, _, err = call(capsys, "generate", "--from", first, "--seed", 2, "--steps", 3, "--reuse", "off", "-o", other)
    assert (code, err) == (0, "") and pixels(other) != pixels(first)
    data = json.loads(call(capsys, "metadata", other, "--json")[1])["diffusion_accel"]
    assert (data["seed"], data["settings"]["steps"], data["features"]) == (2, 3, {})
    assert data["prompt"] == given[0] and data["settings"]["negative_prompt"] == "grey"
    assert data["settings"]["scheduler"] == "ddim,trailing"


def test_a_model_of_ones_own_is_named_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = tmp_path / "first.png"
    start = tmp_path / "start.png"
    Image.linear_gradient("L").convert("RGB").resize((16, 16)).save(start)
    own = ("-m", folder / "plain")
    drawn = ("--image", start, "--strength", 0.7, "--reuse", "hold:2")
    assert call(capsys, "generate", "red", *own, *drawn, *SMALL, "-q", "-o", first)[0] == 0
    code, _, err = call(capsys, "generate", "--from", first, "-o", tmp_path / "a.png")
    assert (
        code == 2 and err.count("\n") == 1 and "'plain', which is no part of this package" in err and "--model" in err
    )
    code, _, err = call(capsys, "generate", "--from", first, *own, "-o", tmp_path / "a.png")
    assert (code, err) == (0, "") and pixels(first) == pixels(tmp_path / "a.png"), "start.png lies beside it"
    moved = tmp_path / "elsewhere" / "first.png"
    moved.parent.mkdir()
    moved.write_bytes(first.read_bytes())
    code, _, err = call(capsys, "generate", "--from", moved, *own, "-o", tmp_path / "b.png")
    assert code == 2 and err.count("\n") == 1 and "there is no 'start.png' beside it; give --image" in err
    code, _, err = call(capsys, "generate", "--from", moved, *own, "--image", start, "-o", tmp_path / "b.png")
    assert (code, err) == (0, "") and pixels(first) == pixels(tmp_path / "b.png")


def test_whole_paths_are_followed_where_that_is_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    own = ("-m", folder / "plain", "--paths")
    assert call(capsys, "generate", "red", *own, *SMALL, "-q", "-o", first)[0] == 0
    code, _, err = call(capsys, "generate", "--from", first, "-o", again)
    assert code == 2 and "no part of this package" in err and not again.exists()
    code, _, err = call(capsys, "generate", "--from", first, "--paths", "-o", again)
    assert (code, err) == (0, "") and pixels(first) == pixels(again)


def test_what_a_recipe_brought_comes_with_the_recipe(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, plain = tmp_path / "first.png", tmp_path / "plain.png"
    fast = ("-m", folder / "fast", "--seed", 5)
    assert call(capsys, "generate", "red", *fast, *SMALL, "-q", "-o", first)[0] == 0
    assert call(capsys, "generate", "red", *fast, *SMALL, "--recipe", "off", "-q", "-o", plain)[0] == 0
    assert pixels(first) != pixels(plain)
    for image in (first, plain):
        again = image.with_stem("again")
        code, _, err = call(capsys, "generate", "--from", image, *fast, "--overwrite", "-o", again)
        assert (code, err) == (0, "") and pixels(image) == pixels(again)
    named = ("-m", folder / "plain", "--seed", 5, "--recipe", folder / "fast")
    code, _, err = call(capsys, "generate", "--from", first, *named, "--overwrite", "-o", again)
    assert (code, err) == (0, "") and pixels(first) == pixels(again)
    off = (*fast, "--recipe", "off")
    code, _, err = call(capsys, "generate", "--from", first, *off, "--overwrite", "-o", again)
    assert (code, err) == (0, "") and pixels(plain) == pixels(again), "nothing of the recipe"


def test_what_auto_chose_is_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = {"reuse": {"plan": "auto", "speedup": None, "min_psnr": None}}
    chosen = {"choices": {"reuse": {"plan": "hold:3", "outcome": "x"}}}
    again = read_again(str(written(tmp_path / "a.png", features=features, report=chosen)), ())
    assert again.values["reuse"] == {"plan": "hold:3"}
    again = read_again(str(written(tmp_path / "b.png", features=features)), ())
    assert again.values["reuse"]["plan"] == "auto"


def test_images_of_one_call_other_weights_and_other_versions_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, again = tmp_path / "two", tmp_path / "again"
    given = ("--steps", 2, "--seed", 5, "--count", 2, "-q")
    assert call(capsys, "generate", "red apple", *given, "-o", folder)[0] == 0
    second = folder / "0002-6.png"
    code, _, err = call(capsys, "generate", "--from", second, "-o", tmp_path / "a.png")
    assert code == 0 and err.count("\n") == 1 and "image 2 of 2 of one call; --seed 5 --count 2" in err
    code, _, err = call(capsys, "generate", "--from", second, "--seed", 5, "--count", 2, "-o", again)
    assert (code, err) == (0, "") and pixels(again / "0002-6.png") == pixels(second)
    old = written(tmp_path / "old.png", versions={"torch": "1.0\n", "other": "2"}, model_hash="0123456789")
    code, _, err = call(capsys, "generate", "--from", old, "--count", 1, "-o", tmp_path / "b.png")
    notes = err.splitlines()
    assert code == 0 and len(notes) == 2 and "was drawn with torch 1.0\\x0a; here are torch " in notes[0]
    assert "other weights than the one that drew" in notes[1]


def test_an_image_without_our_settings_is_refused(
    no_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, other, broken = (tmp_path / f"{name}.png" for name in ("plain", "other", "broken"))
    Image.new("RGB", (16, 16)).save(plain)
    save_image(Image.new("RGB", (16, 16)), other, "a cat\nSteps: 20, Seed: 1", {})
    broken.write_bytes(b"no image")
    for file, words in (
        (plain, "it has no settings that diffusion-accel has written"),
        (other, "it has no settings that diffusion-accel has written"),
        (broken, "is not an image"),
        (tmp_path / "none.png", "no such file"),
    ):
        code, out, err = call(capsys, "generate", "--from", file, "-o", tmp_path / "new.png")
        assert code == 1 and words in err and err.count("\n") == 1 and not out


REUSE = {"plan": "hold:2"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": 5}, "must be a text, got 5"),
        ({"prompt": None}, "it has no prompt"),
        ({"prompt": "\ud800"}, "not valid UTF-8"),
        ({"seed": -1}, "seed must be"),
        ({"seed": "1"}, "seed must be a whole number"),
        ({"model": "/etc"}, "no part of this package"),
        ({"model": "owner/model"}, "no part of this package"),
        ({"model": "https://host/x.safetensors"}, "no part of this package"),
        ({"model": ["sticker"]}, "model must be a text"),
        ({"settings": []}, "settings must be a table"),
        ({"settings": {"allow_pickle": True}}, "'allow_pickle' is a setting that generate does not know"),
        ({"settings": {"output": "/tmp/x"}}, "'output' is a setting that generate does not know"),
        ({"settings": {"overwrite": True}}, "does not know"),
        ({"settings": {"steps": 5000}}, "asks for 5000 steps; more than 1000 need --steps"),
        ({"settings": {"steps": 10**30}}, "steps must be"),
        ({"settings": {"width": 32768}}, "asks for a width of 32768 pixels and has 16 itself; give --width"),
        ({"settings": {"height": 4096}}, "give --height"),
        ({"settings": {"strength": "high"}}, "strength must be a number"),
        ({"settings": {"image": "/etc/hostname"}}, "leaves the image's folder; what a file names lies beside it; give"),
        ({"settings": {"image": "../secret.png"}}, "leaves the image's folder"),
        ({"settings": {"image": "~/secret.png"}}, "leaves the image's folder"),
        ({"settings": {"image": "C:\\secret.png"}}, "a file is a relative path with /"),
        ({"settings": {"image": "link.png"}}, "has a link that leaves the image's folder"),
        ({"settings": {"image": "start.png\0"}}, "no character NUL"),
        ({"settings": {"controlnet": "owner/net", "control_image": "a.png"}}, "there is no 'owner/net' beside it"),
        ({"settings": {"lora": ["/weights.safetensors:0.5"]}}, "leaves the image's folder"),
        ({"settings": {"lora": ["a:1"] * 100}}, "100 LoRAs; at most 64"),
        ({"settings": {"lora": "a"}}, "lora must be a list"),
        ({"settings": {"quantize": "../folder"}}, "leaves the image's folder"),
        ({"settings": {"recipe": "/etc"}}, "leaves the image's folder"),
        ({"settings": {"scheduler": "/etc/solver.json"}}, "leaves the image's folder"),
        ({"settings": {"scheduler": "NoSuchScheduler/../x"}}, "leaves the image's folder"),
        ({"features": {"reuse": "hold:2"}}, "settings must be a table"),
        ({"features": {"magic": {}}}, "'magic' is no feature"),
        ({"features": {"reuse": {"plan": "hold:0"}}}, "hold"),
        (
            {"features": {"reuse": {"plan": "tuned:/etc/plan.json:fast"}}},
            "leaves the image's folder; what a file names",
        ),
        ({"features": {"reuse": {"plan": "plan.json"}}}, "there is no 'plan.json' beside it; give --reuse"),
        ({"features": {"reuse": REUSE | {"speed": 2}}}, "unknown key 'speed'"),
        ({"features": {"transparent": {"weights": "owner/weights"}}}, "of the hub; give --transparent"),
        ({"features": {"transparent": {"weights": "/etc"}}}, "leaves the image's folder"),
        ({"features": {"transparent": {"foreground": "../x.png"}}}, "leaves the image's folder"),
        ({"features": {"patch_parallel": {"ranks": 1000}}}, "more processes than"),
    ],
)
def test_hostile_settings_are_refused_in_one_line(
    changes: dict[str, Any], words: str, no_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outside.png").write_bytes(b"secret")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "link.png").symlink_to("../outside.png")
    file = written(inner / "a.png", **changes)
    code, out, err = call(capsys, "generate", "--from", file, "-o", tmp_path / "new.png")
    assert code in (1, 2) and words in err and err.count("\n") == 1 and not out, err
    assert "Traceback" not in err and not (tmp_path / "new.png").exists()


def test_what_is_given_is_not_asked_of_the_image(tmp_path: Path) -> None:
    bad = {"steps": 5000, "image": "/x.png", "width": 9999}
    file = written(tmp_path / "a.png", model="/x", settings=bad, features={"reuse": {"plan": "/x.json"}})
    again = read_again(str(file), ("model", "steps", "image", "width", "reuse"))
    assert again.values == {"prompt": "red apple", "seed": 1}
    with pytest.raises(AccelerationError):
        read_again(str(file), ("steps", "image", "width", "reuse"))


def test_a_number_of_zero_is_given_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "a.png", seed=-1, settings={"steps": 2, "guidance_scale": -1})
    given = ("--seed", 0, "--guidance-scale", 0, "-q")
    code, _, err = call(capsys, "generate", "--from", file, *given, "-o", tmp_path / "b.png")
    assert (code, err) == (0, "")
    data = json.loads(call(capsys, "metadata", tmp_path / "b.png", "--json")[1])["diffusion_accel"]
    assert (data["seed"], data["settings"]["guidance_scale"]) == (0, 0)


def test_what_belongs_to_a_feature_goes_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"steps": 2, "premultiplied": True, "quantize": "x", "runtime": "integer", "low_memory": True}
    file = written(tmp_path / "a.png", settings=settings, features={"transparent": {}})
    off = ("--transparent", "off", "--quantize", "off")
    code, _, err = call(capsys, "generate", "--from", file, *off, "-q", "-o", tmp_path / "b.png")
    assert (code, err) == (0, "")
    kept = read_again(str(file), {"quantize"}).values
    assert kept["premultiplied"] is kept["low_memory"] is True


def test_a_name_with_underscores_is_said_as_it_is(tmp_path: Path) -> None:
    file = written(tmp_path / "my_red_apple.png", settings={"scheduler": ""})
    with pytest.raises(AccelerationError, match=r"my_red_apple\.png: scheduler is empty"):
        read_again(str(file), ())
    file = written(tmp_path / "my_red_apple.png", settings={"control_guidance_start": 1.0})
    with pytest.raises(AccelerationError, match=r"my_red_apple\.png: control-guidance-start must be below control-gui"):
        read_again(str(file), ())


def test_a_call_that_cannot_have_been_is_not_told(tmp_path: Path) -> None:
    file = written(tmp_path / "a.png", seed=1, together=[3, 5])
    assert read_again(str(file), ()).together is None
    assert read_again(str(written(file, seed=3, together=[3, 5])), ()).together == (3, 5)


def test_relative_paths_are_written_as_whole_ones(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    Image.linear_gradient("L").convert("RGB").resize((16, 16)).save(tmp_path / "in" / "start.png")
    (tmp_path / "plain").symlink_to(folder / "plain")
    (tmp_path / "ddim").mkdir()  # not what the scheduler means
    monkeypatch.chdir(tmp_path)
    given = ("-m", "./plain", "--image", "in/start.png", "--scheduler", "ddim", "--paths", "-q")
    assert call(capsys, "generate", "red", *given, *SMALL, "-o", "first.png")[0] == 0
    data = json.loads(call(capsys, "metadata", "first.png", "--json")[1])["diffusion_accel"]
    assert data["model"] == str(tmp_path / "plain")
    assert data["settings"]["image"] == str(tmp_path / "in" / "start.png")
    assert data["settings"]["scheduler"] == "ddim"
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    code, _, err = call(capsys, "generate", "--from", "../first.png", "--paths", "-q", "-o", "again.png")
    assert (code, err) == (0, "") and pixels(tmp_path / "first.png") == pixels(tmp_path / "out" / "again.png")
