"""Videos: pipelines that draw them, and the files that hold them."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

import model_folder
import numpy as np
import pytest
import zoo
from command import call
from diffusers import AnimateDiffPipeline, StableVideoDiffusionPipeline
from PIL import Image, ImageSequence
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusion_accel import switchboard
from diffusion_accel.cli.from_image import read_again
from diffusion_accel.errors import ConfigurationError, OutputError
from diffusion_accel.generation.clips import Clip, durations, frames_shown, save_clip
from diffusion_accel.image_files import read_metadata

SMALL = ("--steps", 2, "--width", 16, "--height", 16, "--frames", 4, "--seed", 1, "-q")


@pytest.fixture(scope="module")
def animated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("animated")
    parts: dict[str, Any] = dict(zoo.animatediff()[0].components)
    parts |= {"tokenizer": model_folder.tokenizer(), "text_encoder": model_folder.text_encoder()}
    AnimateDiffPipeline(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def from_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Video Diffusion, which is told nothing but an image."""
    folder = tmp_path_factory.mktemp("svd")
    vision = CLIPVisionConfig(
        hidden_size=zoo.DIM,
        projection_dim=zoo.DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=224,  # whatever the image, the pipeline makes it so large
        patch_size=112,
    )
    parts: dict[str, Any] = dict(zoo.svd()[0].components)
    parts["image_encoder"] = zoo.seeded(lambda: CLIPVisionModelWithProjection(vision))
    parts["feature_extractor"] = CLIPImageProcessor(crop_size=224, size=224)
    StableVideoDiffusionPipeline(**parts).save_pretrained(folder)
    return folder


def frames_of(path: Path) -> list[Any]:
    with Image.open(path) as image:
        return [np.asarray(frame.convert("RGB"), dtype=float) for frame in ImageSequence.Iterator(image)]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_video_and_the_same_again(
    animated: Path, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = tmp_path / f"first{suffix}", tmp_path / f"again{suffix}"
    code, _, err = call(capsys, "generate", "red", "-m", animated, *SMALL, "--fps", 10, "-o", first)
    assert code == 0, err
    frames = frames_of(first)
    assert len(frames) == 4 and frames[0].shape == (16, 16, 3)
    assert any(not np.array_equal(frames[0], frame) for frame in frames[1:])
    with Image.open(first) as image:
        image.seek(1)
        image.load()
        assert image.info["duration"] == 100 and image.info.get("loop") == 0
    data = read_metadata(str(first))[1]
    assert data is not None and data["settings"]["frames"] == 4 and data["settings"]["fps"] == 10
    code, _, err = call(capsys, "generate", "--from", first, "-m", animated, "-q", "-o", again)
    assert code == 0, err
    assert all(np.array_equal(a, b) for a, b in zip(frames, frames_of(again), strict=True))
    two = ("--count", 2, "-o", tmp_path / f"two{suffix}")
    code, _, err = call(capsys, "generate", "red", "-m", animated, *SMALL, *two)
    assert code == 0, err
    one, other = (frames_of(tmp_path / f"two-{k}{suffix}") for k in (1, 2))
    assert np.array_equal(one, frames) and not np.array_equal(one, other)


def test_each_clip_is_written_when_it_is_there(
    animated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[list[str]] = []
    took: list[float] = []
    draw = AnimateDiffPipeline.__call__

    @functools.wraps(draw)
    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        there.append(sorted(path.name for path in tmp_path.iterdir()))
        if len(there) == 3:
            raise RuntimeError("no memory is left")
        begun = time.perf_counter()
        try:
            return draw(self, *args, **kwargs)
        finally:
            took.append(time.perf_counter() - begun)

    monkeypatch.setattr(AnimateDiffPipeline, "__call__", failing)
    monkeypatch.setattr(switchboard, "_classes", {})
    options = (*SMALL, "--count", 3, "--json", "-o", tmp_path / "a.gif")
    begun = time.perf_counter()
    code, out, err = call(capsys, "generate", "red", "-m", animated, *options)
    whole = time.perf_counter() - begun
    assert code == 1 and "no memory is left" in err, err
    assert there == [[], ["a-1.gif"], ["a-1.gif", "a-2.gif"]]
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["seed"] for line in lines] == [1, 2]
    seconds = [line["seconds"] for line in lines]
    assert all(said >= within - 1e-4 for said, within in zip(seconds, took, strict=True)), "its own call"
    assert sum(seconds) <= whole + 1e-3, "and no other's"


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_frames_that_are_alike_count_and_take_their_time(suffix: str, tmp_path: Path) -> None:
    path, colours = tmp_path / f"a{suffix}", ["red", "red", "blue", "blue", "blue", "red", "red"]
    data = {"prompt": "red", "seed": 1, "model": "sticker", "settings": {"frames": 7, "fps": 24}, "features": {}}
    save_clip(Clip(tuple(Image.new("RGB", (16, 16), colour) for colour in colours)), path, 24, "text", data)
    with Image.open(path) as image:
        assert image.n_frames == 3 and frames_shown(image, 24) == 7
    assert read_again(str(path), ()).values["frames"] == 7
    data["settings"] = {"frames": 9, "fps": 24}
    save_clip(Clip((Image.new("RGB", (16, 16)),) * 7), path, 24, "text", data)
    with pytest.raises(ConfigurationError, match="asks for 9 frames"):
        read_again(str(path), ())


def test_a_clip_takes_its_time() -> None:
    for fps in (1, 7.5, 8, 24, 30, 50):
        times = durations(60, fps, 10)
        assert abs(sum(times) - 60_000 / fps) <= 5 and min(times) >= 20 and not any(time % 10 for time in times)
    assert durations(3, 8, 1) == [125, 125, 125]


def test_of_many_prompts_a_folder_holds_no_clips(
    animated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = ("--distribute", "prompts", "-o", tmp_path / "many")
    code, _, err = call(capsys, "generate", "red", "-m", animated, *SMALL, *many)
    assert code == 2 and "the model draws videos; use .gif" in err and err.count("\n") == 1, err
    assert not [*tmp_path.rglob("*.png")]


def test_mp4(animated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imageio = pytest.importorskip("imageio")
    pytest.importorskip("imageio_ffmpeg")
    path = tmp_path / "a.mp4"
    code, _, err = call(capsys, "generate", "red", "-m", animated, *SMALL, "-o", path)
    assert code == 0, err
    with imageio.get_reader(path) as reader:
        assert sum(1 for _ in reader) == 4 and reader.get_meta_data()["fps"] == 8


def test_an_mp4_that_is_scaled_is_told(animated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("imageio_ffmpeg")
    for size, says in (("24", "warning: {} has 32x16 pixels, scaled from 24x16: sides of .mp4 are"), ("16", "")):
        path = tmp_path / f"{size}.mp4"
        code, _, err = call(capsys, "generate", "red", "-m", animated, *SMALL, "--width", size, "-o", path)
        assert code == 0 and says.format(path) in err and err.count("\n") == bool(says), err


def test_an_mp4_that_was_cut_off_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("imageio_ffmpeg")
    import diffusers.utils

    write = diffusers.utils.export_to_video

    def full(frames: list[Any], path: str, fps: float) -> None:
        write(frames, path, fps=fps)
        Path(path).write_bytes(Path(path).read_bytes()[:400])  # as ffmpeg leaves it on a full disk, and says nothing

    clip = Clip(tuple(Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "red")))
    save_clip(clip, tmp_path / "a.mp4", 8)
    monkeypatch.setattr(diffusers.utils, "export_to_video", full)
    with pytest.raises(OutputError, match=r"b\.mp4: ffmpeg did not finish the file"):
        save_clip(clip, tmp_path / "b.mp4", 8)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_from_an_image_alone(from_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = tmp_path / "start.png"
    Image.new("RGB", (16, 16), "red").save(start)
    given = ("generate", "-m", from_image, *SMALL[:6], "--frames", 3, "--seed", 1, "-q")
    code, _, err = call(capsys, *given, "--image", start, "-o", tmp_path / "a.gif")
    assert code == 0, err
    assert len(frames_of(tmp_path / "a.gif")) == 3
    again = ("--from", tmp_path / "a.gif", "-m", from_image, "-q", "-o", tmp_path / "b.gif")
    code, _, err = call(capsys, "generate", *again)
    assert code == 0, err
    assert np.array_equal(frames_of(tmp_path / "a.gif"), frames_of(tmp_path / "b.gif"))
    code, _, err = call(capsys, *given, "-o", tmp_path / "c.gif")
    assert code == 2 and "there is no prompt" in err and err.count("\n") == 1
    code, _, err = call(capsys, *given, "red", "-o", tmp_path / "c.gif")
    assert code == 2 and err == "error: StableVideoDiffusionPipeline needs --image\n"
    code, _, err = call(capsys, *given, "red", "--image", start, "--strength", 0.5, "-o", tmp_path / "c.gif")
    assert code == 2 and "does not take" in err and "--strength" in err and err.count("\n") == 1


def test_what_does_not_fit(
    animated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    still = model_folder.write_folder(tmp_path / "still")
    capsys.readouterr()
    for model, given, words in (
        (animated, ("-o", tmp_path / "a.png"), "the model draws videos; use .gif, .webp, .mp4"),
        (animated, ("-o", f"{tmp_path}/folder/"), "the model draws videos; use .gif, .webp, .mp4"),
        (animated, ("-o", tmp_path / "a.gif", "--compare", "--reuse", "hold:2"), "--compare compares images"),
        (animated, ("-o", tmp_path / "a.gif", "--preview-steps", 1), "--preview-steps is not possible"),
        (animated, ("-o", tmp_path / "a.gif", "--fps", 0), "--fps must be at least 1"),
        (animated, ("-o", tmp_path / "a.gif", "--fps", 51), "a GIF plays at most 50 frames a second"),
        (animated, ("-o", tmp_path / "a.avi"), "unknown image type .avi"),
    ):
        code, _, err = call(capsys, "generate", "red", "-m", model, *SMALL, *given)
        assert code == 2 and words in err and err.count("\n") == 1, err
    some = ("generate", "red", "-m", still, "--steps", 2)
    code, _, err = call(capsys, *some, "-o", tmp_path / "a.gif")
    assert code == 2 and "the model draws images; allowed: .png" in err and err.count("\n") == 1, err
    code, _, err = call(capsys, *some, "--frames", 2, "-o", tmp_path / "a.png")
    assert code == 2 and "does not take --frames" in err, err
    code, _, err = call(capsys, *some, "--fps", 2, "-o", tmp_path / "a.png")
    assert code == 2 and "does not take --fps" in err, err
    monkeypatch.setattr("diffusion_accel.generation.clips.find_spec", lambda name: None)
    code, _, err = call(capsys, "generate", "red", "-m", animated, "-o", tmp_path / "a.mp4")
    assert code == 2 and "pip install 'diffusion-accel[video]'" in err and err.count("\n") == 1


def test_a_clip_that_cannot_be_written(tmp_path: Path) -> None:
    clip = Clip((Image.new("RGB", (20_000, 8)),))
    with pytest.raises(OutputError, match="cannot write"):
        save_clip(clip, tmp_path / "a.webp", 8)
    assert not [*tmp_path.iterdir()]
