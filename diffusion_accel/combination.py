"""Linear combinations of predictions and latents, alike at all positions: one for all channels, or one for each.

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
#: of the text of a combination
PATTERN = rf"{_LIST};(?:{_LIST})?(?:\|{_LIST};(?:{_LIST})?){{0,{MOST_CHANNELS - 1}}}"


@dataclass(frozen=True)
class Combination:
    """Σⱼ predictions[c][j] · yⱼ + Σₖ latents[c][k] · xₖ for each channel c.

    Attributes:
        predictions: what each prediction counts, the newest first; a tuple for each channel, or one for all.
        latents: what each of the latents counts, the current ones first; as many tuples, which may be empty.
    """

    predictions: tuple[tuple[float, ...], ...]
    latents: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        rounded = [
            tuple(tuple(round(float(v), DIGITS) + 0.0 for v in row) for row in rows) for rows in vars(self).values()
        ]
        object.__setattr__(self, "predictions", rounded[0])
        object.__setattr__(self, "latents", rounded[1])
        sizes = {(len(p), len(x)) for p, x in zip(*rounded, strict=False)}
        alike = len(rounded[0]) == len(rounded[1]) and len(sizes) == 1
        if not alike or not 0 < len(rounded[0]) <= MOST_CHANNELS or not self.count or self._too_many():
            raise ConfigurationError(
                f"a combination has 1 to {MOST_TERMS} numbers for predictions and at most {MOST_TERMS} for latents, as "
                f"many in each of at most {MOST_CHANNELS} channels; got {shown(vars(self))}"
            )
        if not all(abs(v) <= MOST for rows in rounded for row in rows for v in row):
            raise ConfigurationError(f"a number of a combination must be at most {MOST:g}, got {shown(vars(self))}")

    def _too_many(self) -> bool:
        return max(self.count, self.count_latents) > MOST_TERMS

    @property
    def count(self) -> int:
        """Of how many predictions it is."""
        return len(self.predictions[0])

    @property
    def count_latents(self) -> int:
        """Of how many latents it is."""
        return len(self.latents[0])

    @property
    def channels(self) -> int:
        """For how many channels it has numbers of their own; 1: they are the same for all."""
        return len(self.predictions)

    def __str__(self) -> str:
        rows = zip(self.predictions, self.latents, strict=True)
        return "|".join(f"{_numbers(p)};{_numbers(x)}" for p, x in rows)

    @classmethod
    def parse(cls, text: str) -> Combination:
        """The inverse of `str`: the numbers of predictions, a semicolon, those of latents; channels behind "|".

        Raises:
            ConfigurationError: it is no combination.
        """
        if re.fullmatch(PATTERN, text) is None:
            raise ConfigurationError(
                "a combination is numbers of predictions, a semicolon and numbers of latents, such as 1.2,-0.2;0.01, "
                f"for each channel behind |; got {shown(text)}"
            )
        rows = [row.partition(";")[::2] for row in text.split("|")]
        read = [[tuple(float(v) for v in part.split(",") if v) for part in row] for row in rows]
        return cls(tuple(p for p, _ in read), tuple(x for _, x in read))

    def fits(self, channels: int) -> bool:
        """Whether it is for so many channels."""
        return self.channels in (1, channels)

    def apply(self, predictions: Sequence[torch.Tensor], latents: Sequence[torch.Tensor]) -> torch.Tensor:
        """The combination, in float32 or better, as the dtype of the first prediction.

        Args:
            predictions: at least `count`, the newest first, all of one shape: (B, C, …), or (B, L, C) for tokens.
            latents: at least `count_latents` of the same shape, the current ones first.
        """
        import torch  # heavy: plans are read without it

        first = predictions[0]
        wide = first.dtype if first.dtype == torch.float64 else torch.float32
        parts = [*predictions[: self.count], *latents[: self.count_latents]]
        rows = [(*p, *x) for p, x in zip(self.predictions, self.latents, strict=True)]
        table = torch.tensor(rows, dtype=wide).to(first.device, non_blocking=first.is_cuda)  # waits for nothing
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
