"""Transparent images on the command line, end to end with weights of random numbers for the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import call
from PIL import Image
from transparency_weights import sharing_tensors

from diffusion_accel.compositing import checkerboard, over

PROMPT = "red apple, 3d style"
FEW = ["--steps", "3", "--seed", "1"]


def opened(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_straight_and_premultiplied_images_and_a_preview(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"{name}.{suffix}" for name in ("straight", "multiplied")]
    flags = ["--transparent", "views=1", "--preview", "#ff8000"]
    code, out, err = call(capsys, "generate", PROMPT, *FEW, *flags, "-o", paths[0])
    assert code == 0 and not err and "straight-preview.png  over #ff8000" in out
    assert "transparent: 1 image decoded from 1 side" in out
    assert call(capsys, "generate", PROMPT, *FEW, *flags, "--premultiplied", "-o", paths[1], "-q")[:2] == (0, "")
    image = Image.open(paths[0])
    assert image.mode == "RGBA" and image.size == (96, 96)
    straight, multiplied = map(opened, paths)
    if suffix == "png":
        assert np.array_equal(straight[..., 3], multiplied[..., 3])
        assert np.abs(multiplied[..., :3] - straight[..., :3] * straight[..., 3:] / 255).max() <= 1
        preview = opened(tmp_path / "straight-preview.png")
        assert np.array_equal(preview, np.asarray(over(image, (255, 128, 0))))
        corner = straight[0, 0]
        assert corner[3] < 13, "an apple does not reach the corner"
        assert call(capsys, "metadata", paths[0])[1].startswith(PROMPT)


def test_cutout_and_compose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    y, x = np.mgrid[:70, :90]
    alpha = np.clip(25 - np.hypot(y - 35, x - 45), 0, 1) * 255
    disc = np.stack([np.full_like(alpha, 220), np.full_like(alpha, 40), np.full_like(alpha, 40), alpha], -1)
    Image.fromarray(disc.round().astype(np.uint8)).save(tmp_path / "disc.png")
    out = tmp_path / "back.png"
    code, text, _ = call(capsys, "cutout", tmp_path / "disc.png", "-o", out, "--preview", "checkerboard")
    assert code == 0 and "alpha PSNR" in text
    made = opened(out)
    assert made.shape == (70, 90, 4) and made[35, 45, 3] > 240 and made[2, 2, 3] < 13
    assert np.abs(made[35, 45, :3] - (220, 40, 40)).max() < 40
    assert opened(tmp_path / "back-preview.png").shape == (70, 90, 3)
    stacked = tmp_path / "stack.webp"
    assert call(capsys, "compose", tmp_path / "disc.png", out, "-o", stacked)[0] == 0
    assert Image.open(stacked).mode == "RGBA"
    flat = tmp_path / "flat.jpg"
    assert call(capsys, "compose", tmp_path / "disc.png", "-o", flat, "--background", "white")[0] == 0
    assert np.abs(opened(flat)[2, 2] - 255).max() < 8
    assert call(capsys, "compose", tmp_path / "disc.png", "-o", flat, "--background", "white")[0] == 1
    small = tmp_path / "small.png"
    Image.new("RGBA", (8, 8)).save(small)
    code, _, err = call(capsys, "compose", tmp_path / "disc.png", small, "-o", tmp_path / "x.png")
    assert code == 2 and "8x8 pixels" in err and "90x70" in err and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("flags", "words", "code"),
    [
        (["--transparent", "-o", "x.jpg"], "JPEG cannot hold transparency; use .png or .webp", 2),
        (["--preview", "white", "-o", "x.png"], "--preview needs --transparent", 2),
        (["--premultiplied", "-o", "x.png"], "--premultiplied needs --transparent", 2),
        (["--transparent", "--preview", "purplish", "-o", "x.png"], "neither checkerboard, nor a colour", 2),
        (["--transparent", "--layers", "fg,bg", "-o", "x.png"], "--layers bg: the variant fg draws fg", 2),
        (["--transparent", "--compare", "-o", "x.png"], "--compare needs a feature to compare", 2),
        (["--transparent", "views=2", "-o", "x.png"], "views must be 8, 4, 1 or 0, got 2", 2),
        (["--transparent", "weights=./none", "-o", "x.png"], "no such folder of weights: ./none", 2),
        (["--transparent", "variant=joint", "-o", "x.png"], "no weights for the variant 'joint'", 2),
    ],
)
def test_what_cannot_be_is_one_line(
    flags: list[str],
    words: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = call(capsys, "generate", PROMPT, *FEW, *flags)
    assert found == code and words in err and err.count("\n") == 1 and not out
    assert not list(tmp_path.iterdir())


def test_no_prompt_of_a_file_may_ask_for_jpeg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['{"prompt": "a", "output": "a.png"}', '{"prompt": "b", "output": "b.jpg"}']
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    flags = ["--prompts-file", tmp_path / "jobs.jsonl", "--transparent", "-o", tmp_path / "out"]
    code, _, err = call(capsys, "generate", *FEW, *flags)
    assert code == 2 and "b.jpg: JPEG cannot hold transparency" in err and not (tmp_path / "out").exists()


def test_existing_previews_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a-preview.png").write_bytes(b"mine")
    flags = ["--transparent", "--preview", "white", "-o", tmp_path / "a.png"]
    code, _, err = call(capsys, "generate", PROMPT, *FEW, *flags)
    assert code == 1 and "a-preview.png exists" in err and not (tmp_path / "a.png").exists()
    assert (tmp_path / "a-preview.png").read_bytes() == b"mine"


def test_an_accelerated_transparent_image_is_compared_with_a_transparent_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: list[Any] = ["--transparent", "--encoder-reuse", "schedule=all", "--compare", "--json"]
    code, out, _ = call(capsys, "generate", PROMPT, *FEW, *flags, "-o", tmp_path / "a.png")
    assert code == 0 and '"psnr": [null]' in out, "the neutral setting: the same RGBA image"
    assert Image.open(tmp_path / "a-compare.png").mode == "RGB"


def test_image_to_image_takes_and_gives_alpha(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    image.paste((200, 30, 30, 255), (24, 24, 72, 72))
    image.save(tmp_path / "in.png")
    flags = ["--transparent", "--image", tmp_path / "in.png", "--strength", "0.4", "-o", tmp_path / "out.png", "-q"]
    assert call(capsys, "generate", PROMPT, *FEW, *flags)[0] == 0
    made = opened(tmp_path / "out.png")
    assert made[48, 48, 3] > 200 and made[3, 3, 3] < 26


def test_the_checkerboard_has_fields_of_64_pixels_or_an_eighth() -> None:
    for size, side in (((96, 96), 12), ((1024, 768), 64)):
        board = np.asarray(checkerboard(size))[..., 0]
        assert board.shape == size[::-1] and len(set(board[0, :side])) == 1 and board[0, side] != board[0, 0]


def test_layers_that_are_drawn_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SD 1.5's joint layers need modules that nothing ships: random ones for the embedded model."""
    import shutil

    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    from diffusion_accel.model_files.names import EMBEDDED
    from diffusion_accel.transparency.weights import write_digests

    folder = tmp_path / "weights"
    shutil.copytree(EMBEDDED["sticker"].path / "transparency", folder)
    unet = UNet2DConditionModel.from_pretrained(EMBEDDED["sticker"].path / "unet")
    save_file({k: v * 0.1 for k, v in sharing_tensors(unet, 3).items()}, folder / "joint.safetensors")
    write_digests(folder)  # of a folder that was changed on purpose
    flags = ["--transparent", f"weights={folder},variant=joint,views=1", "--count", 2, "--preview", "white"]
    code, out, err = call(capsys, "generate", PROMPT, *FEW, *flags, "-o", tmp_path / "a.png")
    assert code == 0 and not err and out.count("recomposition error against blend 0.") == 2
    names = {file.name for file in tmp_path.glob("a-*.png")}
    assert names == {f"a-{k}-{part}.png" for k in (1, 2) for part in ("fg", "bg", "blend", "composite", "preview")}
    assert [Image.open(tmp_path / f"a-1-{part}.png").mode for part in ("fg", "bg", "blend")] == ["RGBA", "RGB", "RGB"]
    fg, bg = (Image.open(tmp_path / f"a-2-{part}.png") for part in ("fg", "bg"))
    assert np.array_equal(opened(tmp_path / "a-2-composite.png"), np.asarray(over(fg, bg)))
    flags = [*flags[:2], "--layers", "fg", "-q"]
    assert call(capsys, "generate", PROMPT, *FEW, *flags, "-o", tmp_path / "b.png")[0] == 0
    assert {file.name for file in tmp_path.glob("b*")} == {"b-fg.png", "b-composite.png"}
    assert np.array_equal(opened(tmp_path / "b-fg.png"), opened(tmp_path / "a-1-fg.png"))
