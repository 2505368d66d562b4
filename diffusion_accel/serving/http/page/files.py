"""Where the images of the page lie as long as the server runs: a folder of its own, of which the oldest go first."""

from __future__ import annotations

import shutil
import tempfile
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_accel.image_files import save_image

if TYPE_CHECKING:
    from PIL import Image

MOST_BYTES = 2**29


class Files:
    """PNG files with names that nobody guesses, readable for this user only.

    Args:
        most: bytes of all of them; the newest one stays in any case.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="diffusion-accel-page-")).resolve()
        self._most, self._kept, self._lock = most, list[tuple[Path, int]](), threading.Lock()

    def keep(
        self, image: Image.Image, name: str, text: str | None = None, data: Mapping[str, Any] | None = None
    ) -> str:
        """Write an image, with its settings if there are any; see `save_image`.

        Args:
            image: what is written.
            name: of the file that a browser saves, without its suffix.
            text, data: the settings.

        Returns:
            The file.
        """
        place = self.folder / uuid.uuid4().hex
        place.mkdir()
        path = place / f"{name}.png"
        save_image(image, path, text, None if data is None else dict(data))
        with self._lock:
            self._kept.append((place, path.stat().st_size))
            while len(self._kept) > 1 and sum(size for _, size in self._kept) > self._most:
                shutil.rmtree(self._kept.pop(0)[0], ignore_errors=True)
        return str(path)

    def close(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)
