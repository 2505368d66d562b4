"""Opening image files as a viewer shows them."""

from __future__ import annotations

import os
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_accel import images
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.images import open_image


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> BytesIO:
    stream = BytesIO()
    image.save(stream, kind, **options)
    stream.seek(0)
    return stream


def test_it_is_turned_as_its_orientation_says() -> None:
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_image(file_of(image, exif=exif.tobytes()), "L")
    assert (np.asarray(opened) == np.rot90(np.asarray(image), -1)).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind: str) -> None:
    values = np.array([[0, 257 * 10, 257 * 200, 65535]], dtype=np.uint16)
    assert np.asarray(open_image(file_of(Image.fromarray(values), kind), "L")).tolist() == [[0, 10, 200, 255]]
    assert np.asarray(open_image(file_of(Image.fromarray(values), kind)))[0, 1].tolist() == [10, 10, 10]


def test_transparency_of_palettes_and_colours_becomes_alpha() -> None:
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    rgb = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8))
    for image, clear in ((palette, 0), (rgb, (255, 0, 0))):
        opened = np.asarray(open_image(file_of(image, transparency=clear), "RGBA"))
        assert opened[0, 0, 3] == 0 and opened[0, 1].tolist() == [0, 0, 255, 255]
        assert np.asarray(open_image(file_of(image, transparency=clear)))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("mode", ["RGB", "I"])
def test_an_image_without_pixels(size: tuple[int, int], mode: str) -> None:
    with pytest.raises(ConfigurationError, match="the image has no pixels"):
        open_image(Image.new(mode, size), what="the image")


def test_of_an_animation_the_first_frame_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    opened = open_image(file_of(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert opened.getpixel((0, 0)) == (254, 0, 0) or opened.getpixel((0, 0)) == (255, 0, 0)
    assert "several frames; the first one is taken" in caplog.text
    caplog.clear()
    open_image(file_of(frames[0], "GIF"))
    assert not caplog.text


def test_what_cannot_be_opened_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(file_of(Image.new("RGB", (64, 64))).getvalue()[:60])
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (
        ("missing.png", "no such file"),
        ("text.png", "not an image"),
        ("cut.png", "not an image"),
        ("pipe.png", "not an image"),
        (".", "not an image"),
    ):
        with pytest.raises(ConfigurationError, match=f"^--image .*{reason}[^\n]*$"):
            open_image(tmp_path / name, what="--image")
    monkeypatch.setattr(images, "PIXEL_LIMIT", 100)
    with pytest.raises(ConfigurationError, match="11x10 pixels"):
        open_image(file_of(Image.new("L", (11, 10))))
    large = Image.new("1", (14000, 13000))  # beyond what Pillow opens by itself
    with pytest.raises(ConfigurationError, match="14000x13000 pixels"):
        open_image(file_of(large))


def test_a_background_is_seen_through_what_is_transparent() -> None:
    rgba = Image.fromarray(np.array([[[200, 100, 0, 0], [200, 100, 0, 255]]], dtype=np.uint8))
    palette = rgba.convert("RGB").quantize(2)
    clear = palette.getpixel((0, 0))
    seen = [[[255, 255, 255], [200, 100, 0]]]
    assert np.asarray(open_image(file_of(rgba), background=(255, 255, 255))).tolist() == seen
    assert np.asarray(open_image(file_of(rgba.convert("LA")), "L", background=(0, 0, 0)))[0, 0] == 0
    made = np.asarray(open_image(file_of(palette, transparency=clear), background=(255, 255, 255)))
    assert made[0, 0].tolist() == [255, 255, 255]
    assert np.asarray(open_image(file_of(rgba.convert("RGB")), background=(0, 0, 0))).tolist() == [[[200, 100, 0]] * 2]


def test_colours_of_a_profile_become_those_of_srgb() -> None:
    from PIL import ImageCms

    grey = Image.new("RGB", (2, 2), (100, 100, 100))
    profile = ImageCms.createProfile("sRGB")
    same = ImageCms.ImageCmsProfile(profile).tobytes()
    assert open_image(file_of(grey, icc_profile=same)).getpixel((0, 0)) == (100, 100, 100)
    linear = bytearray(same)  # with another tone curve: parametric, gamma 1
    at = linear.index(b"para\0\0\0\0")
    linear[at : at + 16] = b"para\0\0\0\0\0\0\0\0\0\1\0\0"
    name = linear.index("sRGB".encode("utf-16-be"))
    linear[name : name + 8] = "flat".encode("utf-16-be")
    assert open_image(file_of(grey, icc_profile=bytes(linear))).getpixel((0, 0))[0] > 140
    for broken in (b"no profile", same[:100]):
        assert open_image(file_of(grey, icc_profile=broken)).getpixel((0, 0)) == (100, 100, 100)


def test_broken_exif_costs_no_image_and_only_raster_images_are_opened(tmp_path: Path) -> None:
    assert open_image(file_of(Image.new("L", (2, 3)), exif=b"Exif\0\0II*\0\xff\xff")).size == (2, 3)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    with pytest.raises(ConfigurationError, match="not an image that can be read"):
        open_image(tmp_path / "a.eps")


def test_images_are_opened_in_one_place() -> None:
    root = Path(images.__file__).parents[1]
    folders = ("diffusion_accel", "pipelines", "quant", "parallel", "scripts")
    files = [file for folder in folders for file in (root / folder).rglob("*.py")]
    found = {f.relative_to(root).as_posix() for f in files if re.search(r"\b(Image|PIL)\.open\(", f.read_text())}
    mine = {f"scripts/{name}.py" for name in ("calibrate_features", "digest_outputs", "two_hosts")}  # what they wrote
    assert found == {"diffusion_accel/images.py"} | mine
