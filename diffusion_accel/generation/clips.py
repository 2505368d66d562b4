"""Clips: what pipelines for videos draw, and the files that hold them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_accel.conditioning import call_parameters
from diffusion_accel.errors import ConfigurationError, OutputError, UnsupportedPipelineError
from diffusion_accel.image_metadata import save_options
from diffusion_accel.io import first_line, replacing

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

MOST_PIXELS = 10**9  # of all frames, that are decoded to see how long each is shown
_BLOCK = 16  # pixels: imageio scales sides of .mp4 to multiples of it
SUFFIXES = (".gif", ".webp", ".mp4")
FPS = 8.0  # frames a second where nobody says
GIF_FPS = 50  # the most that a GIF can say: it counts hundredths, and viewers take one of them for ten


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """A video that was drawn.

    Attributes:
        frames: its images, of one size.
    """

    frames: tuple[Image.Image, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.frames[0].size


def draws_clips(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline draws videos."""
    return asks_for_frames(call_parameters(pipe))


def asks_for_frames(parameters: Iterable[str]) -> bool:
    """Whether a call with these parameters draws videos: it is asked for a number of frames."""
    return not {"num_frames", "video_length"}.isdisjoint(parameters)


def check_images(cls: type) -> None:
    """Raise `UnsupportedPipelineError` for a class of pipelines that draw videos, where images are sent."""
    if asks_for_frames(inspect.signature(cls.__call__).parameters):
        raise UnsupportedPipelineError(
            f"{cls.__name__} draws videos, and a server sends images; generate writes videos"
        )


def check_suffix(path: Path, clip: bool) -> None:
    """Refuse a file that cannot hold what is drawn.

    Args:
        path: that is to be written.
        clip: whether that is a clip.

    Raises:
        ConfigurationError: it cannot, or the package that writes it is not installed.
    """
    suffix = path.suffix.lower()
    if clip and suffix not in SUFFIXES:
        raise ConfigurationError(f"{path}: the model draws videos; use {', '.join(SUFFIXES)}")
    if not clip and suffix in (".gif", ".mp4"):
        raise ConfigurationError(f"{path}: the model draws images; allowed: .png, .webp, .jpg, .jpeg, or a folder")
    if suffix == ".mp4" and (find_spec("imageio") is None or find_spec("imageio_ffmpeg") is None):
        raise ConfigurationError(f"{path}: .mp4 needs imageio: pip install 'diffusion-accel[video]'; .gif does not")


def check_fps(path: Path, fps: float | None) -> None:
    """Raise `ConfigurationError` for a file that cannot be played as fast."""
    if path.suffix.lower() == ".gif" and fps is not None and fps > GIF_FPS:
        raise ConfigurationError(
            f"{path}: a GIF plays at most {GIF_FPS} frames a second; use a lower fps, .webp or .mp4"
        )


def durations(count: int, fps: float, unit: int) -> list[int]:
    """The milliseconds of each frame, multiples of a `unit`, that together are as long as all of them should be."""
    ends = [round(1000 * (k + 1) / (fps * unit)) * unit for k in range(count)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def frames_shown(image: Image.Image, fps: float) -> int:
    """How many frames an opened clip shows at `fps`: a file holds one for several that are alike."""
    count = getattr(image, "n_frames", 1)
    if count == 1 or count * image.width * image.height > MOST_PIXELS:
        return count
    time = 0.0
    for k in range(count):
        image.seek(k)
        image.load()
        time += image.info.get("duration", 0)
    return max(count, round(time * fps / 1000))


def save_clip(clip: Clip, path: Path, fps: float, text: str | None = None, data: dict[str, Any] | None = None) -> None:
    """Write beside and rename; `text` and `data` go into GIF and WebP as metadata, see `image_files.save_image`.

    Args:
        clip: what is written.
        path: a file with one of the `SUFFIXES`.
        fps: frames a second.

    Raises:
        OutputError: the file cannot be written.
    """
    first, *others = clip.frames
    try:
        with replacing(path) as temporary:
            if path.suffix.lower() == ".mp4":
                _save_mp4(clip, temporary, fps)
                return _tell_scaled(clip, path)
            kind = "GIF" if path.suffix.lower() == ".gif" else "WEBP"
            options: dict[str, Any] = {} if text is None else save_options(kind, text, data or {})
            if kind == "WEBP":
                options["quality"] = 95
            options |= {"duration": durations(len(clip.frames), fps, 10 if kind == "GIF" else 1), "loop": 0}
            first.save(temporary, format=kind, save_all=True, append_images=others, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"cannot write {path}: {reason}") from error


def _save_mp4(clip: Clip, path: Path, fps: float) -> None:
    from diffusers.utils import export_to_video  # heavy: diffusers

    theirs = logging.getLogger("imageio_ffmpeg")
    before = theirs.level
    theirs.setLevel(logging.ERROR)  # it warns of what `_tell_scaled` says, with an advice for programmers
    try:
        export_to_video([*clip.frames], str(path), fps=fps)
    finally:
        theirs.setLevel(before)
    _check_whole(path, len(clip.frames))


def _tell_scaled(clip: Clip, path: Path) -> None:
    width, height = (-(-side // _BLOCK) * _BLOCK for side in clip.size)
    if (width, height) != clip.size:
        was = "x".join(map(str, clip.size))
        logger.warning(
            "%s has %dx%d pixels, scaled from %s: sides of .mp4 are multiples of %d", path, width, height, was, _BLOCK
        )


def _check_whole(path: Path, count: int) -> None:
    """Raise `RuntimeError` for an .mp4 that does not hold all frames: ffmpeg ends, and nobody is told how."""
    from imageio_ffmpeg import count_frames_and_secs  # an extra

    try:
        found, _ = count_frames_and_secs(str(path))
    except RuntimeError as error:
        raise RuntimeError("ffmpeg did not finish the file; is the disk full?") from error
    if found < count:
        raise RuntimeError(f"ffmpeg wrote {found} of {count} frames; is the disk full?")
