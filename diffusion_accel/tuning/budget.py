"""The time that a search has."""

from __future__ import annotations

import time


class Budget:
    """So many seconds, from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began = time.monotonic()

    def left(self) -> float:
        """Seconds that are left; below 0 if it is over."""
        return self._began + self.seconds - time.monotonic()

    def used(self) -> float:
        """The share that is used, 0 to 1."""
        return 1 - max(0.0, self.left()) / self.seconds if self.seconds else 1.0

    def share(self, part: float) -> float:
        """The moment (of `time.monotonic`) at which this part of what is left is over."""
        return time.monotonic() + part * max(0.0, self.left())
