"""What rows cost: from measured times of batches follow how many rows are worth computing together, and how long it is
worth to wait for one more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_NEARLY = 0.95  # of the best throughput is as good: fewer rows answer sooner


@dataclass(frozen=True)
class Curve:
    """Seconds of a batch by its number of rows, measured for one kind of call.

    Attributes:
        what: the kind, in words.
        seconds: rows -> seconds.
    """

    what: str = ""

    seconds: Mapping[int, float] = field(default_factory=dict)

    def cap(self, most: int) -> int:
        """The fewest rows that reach 95 % of the best rows a second; `most` if nothing was measured."""
        speeds = {rows: rows / seconds for rows, seconds in self.seconds.items() if rows <= most}
        if not speeds:
            return most
        best = max(speeds.values())
        return min(rows for rows, speed in speeds.items() if speed >= _NEARLY * best)

    def at(self, rows: int) -> float:
        """Seconds of a batch of so many rows, between what was measured on straight lines; 0 if nothing was."""
        known = sorted(self.seconds.items())
        if not known:
            return 0.0
        if len(known) == 1 or rows <= known[0][0]:
            return known[0][1] * (rows / known[0][0] if rows > known[0][0] else 1.0)
        above = next((i for i, (r, _) in enumerate(known) if r >= rows), len(known) - 1)
        (low, early), (high, late) = known[above - 1], known[above]
        return early + (late - early) * (rows - low) / (high - low)

    def saved(self, rows: int, more: int) -> float:
        """Seconds that are saved where `more` rows join a batch of `rows` and are not one of their own."""
        return max(0.0, self.at(rows) + self.at(more) - self.at(rows + more))
