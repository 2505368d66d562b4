"""How anything here that takes long says how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What a long piece of work calls now and then: a progress bar, a log, or nothing.

    tuning, quantizing, comparing, benchmarking and evaluating all take `progress=`, and call it with the same three
    values. It may raise to stop the work.
    """

    def __call__(self, what: str, share: float = 0.0, left: float | None = None) -> None:
        """Told about once a second at most.

        Args:
            what: what is done now, in a few words.
            share: how much of all the work is done, 0 to 1.
            left: seconds that it will take, as far as that is known.
        """


def silent(what: str, share: float = 0.0, left: float | None = None) -> None:
    """The progress that nobody is told."""
