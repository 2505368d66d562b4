"""What is written into images is read back equal, whatever it is; and what other tools wrote is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import call
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion_accel.errors import OutputError
from diffusion_accel.image_files import read_metadata, save_image
from diffusion_accel.image_metadata import names_only, parameters_text, parse_parameters, user_comment

SUFFIXES = (".png", ".webp", ".jpg")
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
PROMPTS = TEXT.filter(lambda text: not any(line.startswith("Negative prompt:") for line in text.split("\n")))
SETTINGS = "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 3, Size: 512x512"
IMAGE = Image.new("RGB", (8, 8))


def written(folder: Path, suffix: str, text: str, data: Any) -> tuple[str | None, Any]:
    path = folder / f"image{suffix}"
    save_image(IMAGE, path, text, data)
    return read_metadata(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metadata")


@settings(max_examples=40)
@given(st.sampled_from(SUFFIXES), TEXT, TEXT)
def test_what_is_written_is_read_back(folder: Path, suffix: str, text: str, prompt: str) -> None:
    assert written(folder, suffix, text, {"prompt": prompt}) == (text, {"prompt": prompt})


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("length", [20_000, 33_000, 300_000])
def test_long_prompts(suffix: str, length: int, tmp_path: Path) -> None:
    """EXIF of a JPEG ends at 64 KiB: what is longer is kept all the same, and other tools find as much as fits."""
    text = "ä\U0001f600, " + "x" * length + f"\nNegative prompt: blue\n{SETTINGS}"
    assert written(tmp_path, suffix, text, {"prompt": text}) == (text, {"prompt": text})
    if suffix != ".png":
        with Image.open(tmp_path / f"image{suffix}") as image:
            comment = user_comment(image.getexif().get_ifd(0x8769)[0x9286])
        assert comment is not None and comment.startswith("ä\U0001f600, xxx") and comment.endswith("\n" + SETTINGS)


def test_an_image_is_not_lost_for_its_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_image(IMAGE, tmp_path / "a.jpg", "text", {"no": {1, 2}})  # a set is no JSON
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.size == (8, 8)
    assert "without its settings" in caplog.text
    with pytest.raises(OutputError, match="cannot write"):
        save_image(Image.new("RGB", (16_384, 8)), tmp_path / "wide.webp", "text", {})
    assert [file.name for file in tmp_path.iterdir()] == ["a.jpg"]


@settings(max_examples=60)
@given(PROMPTS, PROMPTS.filter(bool), st.dictionaries(st.sampled_from(["Steps", "Model", "Accelerated by"]), TEXT))
def test_the_settings_line(prompt: str, negative: str, pairs: dict[str, str]) -> None:
    """Values with commas, colons, quotes and line ends are quoted as the web UI does, and read back."""
    text = parameters_text(prompt, negative, {"Steps": 3, **pairs})
    assert parse_parameters(text) == (prompt, negative, {"Steps": "3", **pairs})


def test_the_settings_line_is_that_of_the_web_ui() -> None:
    text = parameters_text("a", None, {"Steps": 3, "Model": 'x, y: "z"', "Size": "8x8", "Hash": None})
    assert text == 'a\nSteps: 3, Model: "x, y: \\"z\\"", Size: 8x8'
    assert parse_parameters("just a prompt") == ("just a prompt", None, {})
    assert parse_parameters(f"a\nb\n{SETTINGS}")[::2] == ("a\nb", dict(p.split(": ") for p in SETTINGS.split(", ")))


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("prompt", ["a cat", "猫と犬、青い空"])
def test_user_comments_of_other_tools(order: str, prompt: str, tmp_path: Path) -> None:
    text = f"{prompt}\n{SETTINGS}"
    mark = "\ufeff".encode(f"utf-16-{order}")
    for body in (b"", mark):
        assert user_comment(b"UNICODE\0" + body + text.encode(f"utf-16-{order}")) == text
    for head in (b"ASCII\0\0\0", b"\0" * 8, b"", b"UNICODE\0"):
        assert user_comment(head + text.encode()) == text
    assert user_comment(b"ASCII\0\0\0caf\xe9") == "café" and user_comment(b"\0" * 20) is None
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode(f"utf-16-{order}")
    IMAGE.save(tmp_path / "a.jpg", exif=exif)
    assert read_metadata(str(tmp_path / "a.jpg")) == (text, None)


def test_what_older_versions_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = {"parameters": f"a\n{SETTINGS}", "diffusion_accel": {"seed": 3}}
    for values, readable in ((both, True), ({**both, "diffusion_accel": 5}, False)):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + json.dumps(values).encode("utf-16-be")
        IMAGE.save(tmp_path / "a.jpg", exif=exif)
        code, out, err = call(capsys, "metadata", tmp_path / "a.jpg", "--json")
        assert (code == 0 and json.loads(out)["settings"]["Seed"] == "3") if readable else "damaged" in err


def test_broken_and_hostile_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Foreign text reaches the terminal escaped; JSON that is damaged, or too deep, is said in one line."""
    from PIL.PngImagePlugin import PngInfo

    for text, ours in (
        ("\x1b]52;c;eA==\x07 \u202egpj \x9b31m \rSeed\nb", None),
        ("a", "[" * 100_000),
        ("a", "{"),
        ("a", "[1]"),
    ):
        info = PngInfo()
        info.add_itxt("parameters", text)
        if ours is not None:
            info.add_itxt("diffusion_accel", ours)
        IMAGE.save(tmp_path / "a.png", pnginfo=info)
        code, out, err = call(capsys, "metadata", tmp_path / "a.png")
        if ours is None:
            assert (code, out) == (0, "\\x1b]52;c;eA==\\x07 \\u202egpj \\x9b31m \\x0dSeed\nb\n")
        else:
            assert code == 1 and "is damaged" in err and err.count("\n") == 1
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    code, _, err = call(capsys, "metadata", tmp_path / "b.png")
    assert code == 1 and "is not an image that can be read" in err


def test_local_paths_are_names(tmp_path: Path) -> None:
    (tmp_path / "plan.json").touch()
    plan = str(tmp_path / "plan.json")
    data = {"prompt": plan, "settings": {"lora": [f"{plan}:0.5", "./x.safetensors"], "quantize": "~/w4", "n": 3}}
    data |= {"model": "owner/name", "plan": "full hold=0.5", "report": {"features": {"reuse": {"plan": plan}}}}
    data |= {"tuned": [f"tuned:{plan}", "tuned:fast"], "page": "https://example.com/a", "quantizer": "torchao:int8wo"}
    assert names_only(data) == {
        "prompt": plan,
        "settings": {"lora": ["plan.json:0.5", "x.safetensors"], "quantize": "w4", "n": 3},
        "model": "owner/name",
        "plan": "full hold=0.5",
        "report": {"features": {"reuse": {"plan": "plan.json"}}},
        "tuned": ["tuned:plan.json", "tuned:fast"],
        "page": "https://example.com/a",
        "quantizer": "torchao:int8wo",
    }


def test_pixels_stay_as_they_are(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8))
    save_image(noise, tmp_path / "a.png", "text " * 30_000, {})
    assert (np.asarray(Image.open(tmp_path / "a.png")) == np.asarray(noise)).all()
