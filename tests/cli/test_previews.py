"""`generate --preview-steps`: images that are shown before they are finished."""

from __future__ import annotations

import os
import platform
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import call
from model_folder import write_folder
from PIL import Image

from diffusion_accel import interrupts
from diffusion_accel.errors import OutputError
from diffusion_accel.generation import outputs, unfinished

SMALL = ("--width", 16, "--height", 16, "--seed", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The names and images that were written, in turn."""
    seen: list[tuple[str, Any]] = []
    save = outputs.save_image

    def watched(image: Image.Image, path: Path, *more: Any) -> None:
        save(image, path, *more)
        seen.append((path.name, np.asarray(Image.open(path), dtype=float)))

    monkeypatch.setattr(outputs, "save_image", watched)
    monkeypatch.setattr(unfinished, "save_image", watched)
    return seen


def test_shown_on_the_way_and_gone_at_the_end(
    folder: Path, shown: list[tuple[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("-m", folder, *SMALL, "--steps", 6, "--count", 2, "--reuse", "hold:2", "-q")
    assert call(capsys, "generate", "red", *given, "-o", tmp_path / "plain.png")[0] == 0
    shown.clear()
    code, _, err = call(capsys, "generate", "red", *given, "--preview-steps", 2, "-o", tmp_path / "a.png")
    assert (code, err) == (0, "")
    both = ["a-1.preview.png", "a-2.preview.png"]
    assert [name for name, _ in shown] == [*both, *both, "a-1.png", "a-2.png"], "after 2 and 4 of 6 steps"
    first, second, last = (shown[k][1] for k in (0, 2, 4))
    assert first.shape == last.shape and np.abs(second - last).mean() < np.abs(first - last).mean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1.png", "a-2.png", "plain-1.png", "plain-2.png"]
    for k in (1, 2):
        a, b = (np.asarray(Image.open(tmp_path / f"{name}-{k}.png")) for name in ("plain", "a"))
        assert (a == b).all(), "what is shown changes nothing"


def test_a_start_image_has_the_size(
    folder: Path, shown: list[tuple[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (24, 16), "red").save(tmp_path / "start.png")
    given = ("-m", folder, "--steps", 4, "--strength", 1, "--image", tmp_path / "start.png", "--preview-steps", 3)
    assert call(capsys, "generate", "red", *given, "-o", tmp_path / "a.png", "-q")[0] == 0
    assert [(name, image.shape) for name, image in shown] == [("a.preview.png", (16, 24, 3)), ("a.png", (16, 24, 3))]


def test_previews_that_cannot_be(
    folder: Path, no_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.preview.png").write_bytes(b"mine")
    for given, words, status in (
        (("--preview-steps", 0), "--preview-steps must be at least 1", 2),
        (("--preview-steps", 2), "a.preview.png exists", 1),
        (("--preview-steps", 2, "--compare", "--reuse", "hold:2"), "cannot be combined with --compare", 2),
        (("--preview-steps", 2, "--patch-parallel", 2), "cannot be combined with --patch-parallel", 2),
    ):
        code, _, err = call(capsys, "generate", "red", "-m", folder, *given, "-o", tmp_path / "a.png")
        assert code == status and words in err and err.count("\n") == 1, err
    assert (tmp_path / "a.preview.png").read_bytes() == b"mine"


def test_what_was_shown_is_gone_after_a_failure(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def full(image: Image.Image, path: Path, *more: Any) -> None:
        if not path.name.endswith(".preview.png"):
            seen.append(path.with_name("a.preview.png").exists())
            raise OutputError(f"cannot write {path}: No space left on device")
        save(image, path, *more)

    save = outputs.save_image
    monkeypatch.setattr(outputs, "save_image", full)
    monkeypatch.setattr(unfinished, "save_image", full)
    given = ("-m", folder, *SMALL, "--steps", 4, "--preview-steps", 1, "-o", tmp_path / "a.png", "-q")
    code, _, err = call(capsys, "generate", "red", *given)
    assert code == 1 and "No space left" in err and seen == [True]
    assert not [*tmp_path.iterdir()] and interrupts.names() == "nothing was written"


def killed_in_the_middle(image: Path, show: Any) -> None:
    """Show an image in a process that is then killed."""
    child = os.fork()
    if child == 0:
        unfinished.save(show, image)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_what_a_killed_process_has_left_goes_with_the_next_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, left = tmp_path / "a.png", tmp_path / "a.preview.png"
    given = ("generate", "red", "-m", folder, *SMALL, "--steps", 2, "--overwrite", "-q", "-o", path)
    for more in ((), ("--preview-steps", 1)):
        killed_in_the_middle(path, Image.new("RGB", (8, 8)))
        assert left.exists() and unfinished.is_left(path)
        assert call(capsys, *(word for word in given if more == () or word != "--overwrite"), *more)[0] == 0
        assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png"]
        path.unlink()


def test_anything_else_of_that_name_stays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, file = tmp_path / "a.png", tmp_path / "a.preview.png"
    image = Image.new("RGB", (8, 8))

    def stays() -> None:
        before = file.read_bytes()
        assert not unfinished.is_left(path)
        assert call(capsys, "generate", "red", "-m", folder, *SMALL, "--steps", 2, "-q", "-o", path)[0] == 0
        assert file.read_bytes() == before
        path.unlink()
        code, _, err = call(capsys, "generate", "red", "-m", folder, *SMALL, "--preview-steps", 1, "-o", path)
        assert code == 1 and "a.preview.png exists" in err and file.read_bytes() == before

    image.save(file)
    stays()
    killed_in_the_middle(tmp_path / "b.png", image)
    (tmp_path / "b.preview.png").rename(file)  # of another image
    stays()
    parent = os.getppid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: parent)  # a process that runs
        unfinished.save(image, path)
    stays()
    with monkeypatch.context() as patch:
        patch.setattr(platform, "node", lambda: "elsewhere")
        killed_in_the_middle(path, image)
    stays()
    file.write_bytes(b"\x89PNG")
    stays()
