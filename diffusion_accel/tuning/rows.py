"""Where what is recorded of a run lies: in memory, or, if it is large, in half precision in a file that has no name.

In half precision a number is off by up to 2^-11 of itself, so plans can be told apart up to about 66 dB there. What is
fitted to the scheduler's predictions suffers least: predictions go first, latents only if they do not fit either.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence

import torch

from diffusion_accel import interrupts
from diffusion_accel.errors import AccelerationError

IN_MEMORY = 2**30  # bytes of what is recorded of one run


class Rows:
    """Latents, predictions and, where they are not the latents, the scheduler's samples, at every step that is kept.

    Attributes:
        latents, predictions, samples: (S, N, C, …), float32 or float16; `samples` is `latents` until they differ.
    """

    def __init__(self, steps: int, images: int, limit: int = IN_MEMORY) -> None:
        self.steps, self.images, self.limit = steps, images, limit
        self.latents = self.predictions = self.samples = torch.empty(0)

    def write(
        self, step: int, first: int, latents: torch.Tensor, sample: torch.Tensor, predicted: torch.Tensor
    ) -> None:
        """Keep what some images, beginning with the `first` one, have at a step. Steps behind the last are ignored."""
        if step >= self.steps:
            return
        alike = latents is sample
        if not self.latents.numel():
            self._allocate(tuple(latents.shape[1:]), alike)
        if not alike and self.samples is self.latents:  # the first step at which they differ
            self.samples = _allocated(self.latents.shape, self.latents.dtype == torch.float16).copy_(self.latents)
        own = slice(first, first + len(latents))
        self.latents[step, own] = latents.detach().to("cpu", self.latents.dtype)
        self.predictions[step, own] = predicted.detach().to("cpu", self.predictions.dtype)
        if self.samples is not self.latents:
            self.samples[step, own] = sample.detach().to("cpu", self.samples.dtype)

    def _allocate(self, shape: tuple[int, ...], alike: bool) -> None:
        shape = (self.steps, self.images, *shape)
        whole = 4 * math.prod(shape)
        goals = whole if alike else 2 * whole
        self.latents = _allocated(shape, goals > self.limit)
        self.samples = self.latents if alike else _allocated(shape, goals > self.limit)
        self.predictions = _allocated(shape, goals + whole > self.limit)


def _allocated(shape: Sequence[int], large: bool) -> torch.Tensor:
    """Zeros in memory, or mapped from a file that is removed at once: nothing is left behind, however this ends."""
    if not large:
        return torch.zeros(tuple(shape))
    if sys.platform == "win32":  # a file that is mapped cannot be removed there
        return torch.zeros(tuple(shape), dtype=torch.float16)
    count = math.prod(shape)
    with interrupts.temporary_folder() as folder:
        file = folder / "rows"
        try:
            with file.open("wb") as opened:
                _reserve(opened.fileno(), 2 * count)
        except OSError as error:
            raise AccelerationError(
                f"what is recorded needs {2 * count / 2**30:.1f} GiB in {folder.parent}: {error.strerror}; set TMPDIR "
                "to a folder with more room, or give fewer prompts"
            ) from error
        return torch.from_file(str(file), shared=True, size=count, dtype=torch.float16).view(tuple(shape))


def _reserve(descriptor: int, size: int) -> None:
    """Room for a file: one that is mapped and cannot be written ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = bytes(2**20)
    for start in range(0, size, len(zeros)):
        os.write(descriptor, zeros[: size - start])
