"""Which rows (or columns) of an image each process has, at every resolution of a model. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

Interval = tuple[int, int]
ROWS, COLUMNS = -2, -1


@dataclass(frozen=True)
class Level:
    """One resolution of a split image.

    Attributes:
        size: rows of the whole image (columns if it is split by columns).
        other: its extent in the direction that is not split.
        bounds: where the slices begin, and `size` at the end; slice r is `bounds[r]` … `bounds[r + 1]`.
    """

    size: int
    other: int
    bounds: tuple[int, ...]

    def slice(self, part: int) -> Interval:
        """The rows of one part."""
        return self.bounds[part], self.bounds[part + 1]

    def rows(self, part: int) -> int:
        """How many rows one part has."""
        return self.bounds[part + 1] - self.bounds[part]


@dataclass(frozen=True)
class Split:
    """An image in `parts` slices, at each resolution that a model has.

    Resolutions are told apart by the extent that is not split, which every process sees whole, and layers over tokens
    by how many of them a process has.

    Attributes:
        dim: the dimension of a tensor that is split: -2 (rows) or -1 (columns).
        parts: how many slices.
        part: the slice of this process.
        levels: the resolutions, from the finest to the coarsest.
    """

    dim: int
    parts: int
    part: int
    levels: tuple[Level, ...]

    @cached_property
    def by_other(self) -> dict[int, Level]:
        """The resolution by the extent that is not split."""
        return {level.other: level for level in self.levels}

    @cached_property
    def by_tokens(self) -> dict[int, Level]:
        """The resolution by the number of positions that this process has."""
        return {level.rows(self.part) * level.other: level for level in self.levels}


def plan_split(height: int, width: int, parts: int, part: int, halvings: int = 0, doublings: int = 0) -> Split | None:
    """Split an image by rows, or by columns where there are too few rows; None if there are too few of both.

    Slices begin at multiples of 2^halvings, so that they stay slices at every coarser resolution and each part has at
    least one row of the coarsest; sizes that are no such multiple end in an incomplete unit, halved rounding up, as a
    convolution with stride 2 and padding 1 does. Parts differ by at most one unit.

    Args:
        height, width: of the tensor that enters the model.
        halvings, doublings: how many times the model halves, or doubles, that size.
    """
    for dim, size, other in ((ROWS, height, width), (COLUMNS, width, height)):
        unit = 2**halvings
        units = -(-size // unit)
        if units < parts:
            continue
        bounds = tuple(min(units * r // parts * unit, size) for r in range(parts + 1))
        levels = [Level(size * 2**k, other * 2**k, tuple(b * 2**k for b in bounds)) for k in range(doublings, 0, -1)]
        for k in range(halvings + 1):
            levels.append(Level(_halved(size, k), _halved(other, k), tuple(_halved(b, k) for b in bounds)))
        split = Split(dim, parts, part, tuple(levels))
        if len(split.by_other) == len(levels):  # else two resolutions look alike (an image one position wide)
            return split
    return None


def _halved(size: int, times: int) -> int:
    return -(-size // 2**times)


@dataclass(frozen=True)
class Window:
    """How a convolution moves along the split dimension.

    Attributes:
        kernel, stride, dilation: of the convolution.
        before, after: rows of zeros that it adds at the borders of the whole image.
    """

    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    def output(self, level: Level) -> tuple[int, ...]:
        """The bounds of the slices of its output."""
        size = (level.size + self.before + self.after - self.dilation * (self.kernel - 1) - 1) // self.stride + 1
        return (*(min(-(-b // self.stride), size) for b in level.bounds[:-1]), size)

    def needed(self, level: Level, part: int) -> Interval:
        """The rows of its input from which one part computes its output; may reach over the image's borders."""
        bounds = self.output(level)
        first, last = bounds[part], bounds[part + 1] - 1
        reach = self.dilation * (self.kernel - 1) + 1
        return first * self.stride - self.before, last * self.stride - self.before + reach


@dataclass(frozen=True)
class Halo:
    """What one part exchanges with the others for one convolution, in rows of the whole image.

    Attributes:
        above, below: rows of zeros at the image's borders.
        own: the rows of its own that it computes from.
        sends: by part, the rows of its own that it sends.
        receives: by part, the rows that it gets, in order.
    """

    above: int
    below: int
    own: Interval
    sends: dict[int, Interval]
    receives: dict[int, Interval]


def plan_halo(window: Window, level: Level, parts: int, part: int) -> Halo:
    """The exchange of one convolution at one resolution."""
    low, high = window.needed(level, part)
    wanted = (max(low, 0), min(high, level.size))
    sends, receives = {}, {}
    for other in range(parts):
        if other != part:
            theirs = window.needed(level, other)
            if rows := _common(theirs, level.slice(part)):
                sends[other] = rows
            if rows := _common(wanted, level.slice(other)):
                receives[other] = rows
    own = _common(wanted, level.slice(part)) or (level.bounds[part], level.bounds[part])
    return Halo(max(-low, 0), max(high - level.size, 0), own, sends, receives)


def _common(a: Interval, b: Interval) -> Interval | None:
    low, high = max(a[0], b[0]), min(a[1], b[1])
    return (low, high) if low < high else None


def adjacent(parts: int, part: int) -> dict[int, bool]:
    """The neighbours of a part, and whether each lies before it."""
    return {other: other < part for other in (part - 1, part + 1) if 0 <= other < parts}
