"""Linear combinations of predictions, latents and what guidance adds, alike at all positions:
one for all channels, or one for each.

What a solver does between two evaluations, and what stands in for an evaluation that is left out, are such
combinations; so they are what can be fitted (`reuse` for steps that are left out, the learned solver for its own).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ConfigurationError
from .io import shown

if TYPE_CHECKING:
    import torch

MOST_TERMS = 8  # predictions, or latents, of one combination
MOST_CHANNELS = 512
MOST = 10_000.0  # of a number's size
DIGITS = 9  # behind the point
_NUMBER = r"-?[0-9]{1,5}(?:\.[0-9]{1,12})?"
_LIST = rf"{_NUMBER}(?:,{_NUMBER}){{0,{MOST_TERMS - 1}}}"
_ROW = rf"{_LIST};(?:{_LIST})?(?:;{_LIST})?"
#: of the text of a combination
PATTERN = rf"{_ROW}(?:\|{_ROW}){{0,{MOST_CHANNELS - 1}}}"


@dataclass(frozen=True)
class Combination:
    """Σⱼ predictions[c][j] · yⱼ + Σₖ latents[c][k] · xₖ + Σᵢ additions[c][i] · dᵢ for each channel c.

    Attributes:
        predictions: what each prediction counts, the newest first; a tuple for each channel, or one for all.
        latents: what each of the latents counts, the current ones first; as many tuples, which may be empty.
        additions: what each addition of guidance counts, the guided prediction minus the conditional one, the newest
            first; as many tuples, or none at all.
    """

    predictions: tuple[tuple[float, ...], ...]
    latents: tuple[tuple[float, ...], ...]
    additions: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if not any(self.additions):
            object.__setattr__(self, "additions", ((),) * len(self.predictions))
        rounded = [
            tuple(tuple(round(float(v), DIGITS) + 0.0 for v in row) for row in rows) for rows in vars(self).values()
        ]
        for name, rows in zip(tuple(vars(self)), rounded, strict=True):
            object.__setattr__(self, name, rows)
        sizes = {tuple(map(len, rows)) for rows in zip(*rounded, strict=False)}
        alike = len(set(map(len, rounded))) == 1 and len(sizes) == 1
        if not alike or not 0 < len(rounded[0]) <= MOST_CHANNELS or not self.count or self._too_many():
            raise ConfigurationError(
                f"a combination has 1 to {MOST_TERMS} numbers for predictions and at most {MOST_TERMS} for latents and "
                f"for additions, as many in each of at most {MOST_CHANNELS} channels; got {shown(vars(self))}"
            )
        if not all(abs(v) <= MOST for rows in rounded for row in rows for v in row):
            raise ConfigurationError(f"a number of a combination must be at most {MOST:g}, got {shown(vars(self))}")

    def _too_many(self) -> bool:
        return max(self.count, self.count_latents, self.count_additions) > MOST_TERMS

    @property
    def count(self) -> int:
        """Of how many predictions it is."""
        return len(self.predictions[0])

    @property
    def count_latents(self) -> int:
        """Of how many latents it is."""
        return len(self.latents[0])

    @property
    def count_additions(self) -> int:
        """Of how many additions of guidance it is."""
        return len(self.additions[0])

    @property
    def channels(self) -> int:
        """For how many channels it has numbers of their own; 1: they are the same for all."""
        return len(self.predictions)

    @property
    def rows(self) -> list[tuple[float, ...]]:
        """All numbers of each channel."""
        return [(*p, *x, *d) for p, x, d in zip(self.predictions, self.latents, self.additions, strict=True)]

    def __str__(self) -> str:
        parts = zip(self.predictions, self.latents, self.additions, strict=True)
        return "|".join(";".join(map(_numbers, (p, x, d) if d else (p, x))) for p, x, d in parts)

    @classmethod
    def parse(cls, text: str) -> Combination:
        """The inverse of `str`: the numbers of predictions, a semicolon, those of latents, and behind another semicolon
        those of additions, if there are any; channels behind "|".

        Raises:
            ConfigurationError: it is no combination.
        """
        if re.fullmatch(PATTERN, text) is None:
            raise ConfigurationError(
                "a combination is numbers of predictions, a semicolon and numbers of latents, such as 1.2,-0.2;0.01, "
                "then a semicolon and numbers of what guidance adds if wanted, for each channel behind |; "
                f"got {shown(text)}"
            )
        rows = [[tuple(float(v) for v in part.split(",") if v) for part in row.split(";")] for row in text.split("|")]
        return cls(*(tuple(row[n] if n < len(row) else () for row in rows) for n in range(3)))

    def fits(self, channels: int) -> bool:
        """Whether it is for so many channels."""
        return self.channels in (1, channels)

    def apply(
        self,
        predictions: Sequence[torch.Tensor],
        latents: Sequence[torch.Tensor],
        additions: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """The combination, in float32 or better, as the dtype of the first prediction.

        Args:
            predictions: at least `count`, the newest first, all of one shape: (B, C, …), or (B, L, C) for tokens.
            latents: at least `count_latents` of the same shape, the current ones first.
            additions: at least `count_additions` of the same shape, the newest first.
        """
        import torch  # heavy: plans are read without it

        first = predictions[0]
        wide = first.dtype if first.dtype == torch.float64 else torch.float32
        parts = [
            *predictions[: self.count],
            *latents[: self.count_latents],
            *additions[: self.count_additions],
        ]
        table = torch.tensor(self.rows, dtype=wide).to(first.device, non_blocking=first.is_cuda)  # waits for nothing
        shape = [1] * first.dim()
        shape[channel_dim(first)] = self.channels
        mixed = parts[0].to(wide) * table[:, 0].view(shape)
        for n, part in enumerate(parts[1:], 1):
            mixed.addcmul_(part.to(wide), table[:, n].view(shape))
        return mixed.to(first.dtype)


def channel_dim(sample: torch.Tensor) -> int:
    """Where the channels of latents are: the last dimension of tokens (B, L, C), else the second."""
    return 2 if sample.dim() == 3 else 1


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(f"{v:.{DIGITS}f}".rstrip("0").rstrip(".") for v in values)
