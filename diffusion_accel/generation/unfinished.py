"""Files that show an image before it is finished: each says so itself, of what and by which process, so that one that a
killed process has left is known as that, and anybody's own file is not."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_accel.image_files import save_image
from diffusion_accel.image_metadata import CHUNK
from diffusion_accel.io import is_there

if TYPE_CHECKING:
    from PIL import Image


def file_for(path: Path) -> Path:
    """Where the image `path` is shown before it is finished."""
    return path.with_name(f"{path.stem}.preview.png")


def save(image: Image.Image, path: Path) -> None:
    """Show the image `path` as it is now."""
    data = {"unfinished": path.name, "by": [platform.node(), os.getpid()]}
    save_image(image, file_for(path), f"{path.name}, not finished", data)


def is_left(path: Path) -> bool:
    """Whether what shows the image `path` is of a process of this machine that has ended: it was killed."""
    file = file_for(path)
    if sys.platform == "win32" or not is_there(file, "file"):  # where nothing says whether a process runs
        return False
    from diffusion_accel.images import loaded  # late: hardly ever is there such a file

    try:
        with loaded(file) as image:
            values = json.loads(image.info.get(CHUNK, "null"))
        node, process = values["by"] if values["unfinished"] == path.name else (None, 0)
    except Exception:  # an image that cannot be read, or other settings: it is none of ours
        return False
    return node == platform.node() and isinstance(process, int) and process > 0 and not _runs(process)


def _runs(process: int) -> bool:
    """Whether another process with this number runs."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def forget_left(path: Path) -> None:
    """Remove what a killed process has left of the image `path`."""
    if is_left(path):
        file_for(path).unlink(missing_ok=True)
