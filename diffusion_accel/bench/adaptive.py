"""Rules that decide while a call runs which steps are computed: SADA's and EasyCache's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from diffusion_accel.prediction import Conversion

from .forecasts import combined


def adams_moulton(x: torch.Tensor, slopes: Sequence[torch.Tensor], time: float) -> torch.Tensor:
    """Where latents are after `time`, from the last three slopes, the newest first (SADA, section 3.2).

    x̂ = x − Δt (5/8 f₀ + 3/4 f₁ − 3/8 f₂): slopes point to more noise, and time runs to less.
    """
    return x - time * (0.625 * slopes[0] + 0.75 * slopes[1] - 0.375 * slopes[2])


def instability(x_next: torch.Tensor, forecast: torch.Tensor, slopes: Sequence[torch.Tensor]) -> float:
    """SADA's criterion, the mean of (x_next − forecast) · (f₀ − 2 f₁ + f₂): at most 0, the next step is left out."""
    curvature = slopes[0] - 2 * slopes[1] + slopes[2]
    return float(((x_next - forecast) * curvature).double().mean())


def lagrange(steps: Sequence[int], values: Sequence[torch.Tensor], at: int) -> torch.Tensor:
    """The polynomial through all of the values."""
    weights = []
    for own in steps:
        weight = 1.0
        for other in steps:
            weight *= 1.0 if other == own else (at - other) / (own - other)
        weights.append(weight)
    return combined(weights, values)


def slope(conversion: Conversion, prediction: torch.Tensor, x: torch.Tensor, timestep: float) -> torch.Tensor:
    """How the latents change with the timestep on the way that the prediction points: dα/dt · x₀ + dσ/dt · ε."""
    if conversion.by_sigma:
        low, high = timestep - 1e-3, timestep + 1e-3
    else:
        last = conversion.training if conversion.flow else conversion.training - 1
        low, high = max(0.0, timestep - 0.5), min(last, timestep + 0.5)
    (a0, s0), (a1, s1) = conversion.coefficients(low), conversion.coefficients(high)
    channels = x.shape[1]
    clean = conversion.to("sample", prediction, x, timestep)[:, :channels]
    noise = conversion.to("epsilon", prediction, x, timestep)[:, :channels]
    return ((a1 - a0) * clean + (s1 - s0) * noise) / (high - low)


@dataclass
class Sada:
    """SADA (Jiang et al., ICML 2025) on one call: its step rule, without pruning tokens inside of the model.

    As in the released code: one decision for all images of a batch; from the 10th to the 47th of 50 steps the criterion
    decides, at most four in a row are left out, and the clean sample of such a step is what the last prediction says at
    the forecast latents. With `polynomial`, as in its demos for Stable Diffusion, every fourth step from the 24th on is
    computed instead, and clean samples are the polynomial through the last four of every fourth step. These places are
    scaled to other numbers of steps.

    Decided here, where code and paper differ or are silent: slopes and Δt are in one unit, training timesteps, so that
    x̂ is where the latents would be (the released code multiplies β by the number of sampling steps instead of training
    steps, and moves x̂ too little by their ratio); slopes follow from α and σ of the model's schedule, for noise, v,
    clean-sample and flow models; latents of sigma schedulers are scaled to α² + σ² = 1 first.
    """

    conversion: Conversion
    times: Sequence[float]
    polynomial: bool = False
    held: int = 0
    skip: bool = False
    by_polynomial: bool = False
    prediction: torch.Tensor | None = None
    ahead: torch.Tensor | None = None
    slopes: list[torch.Tensor] = field(default_factory=list)
    kept_steps: list[int] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)
    now: torch.Tensor | None = None

    most = 4  # in a row
    interval = 4

    @property
    def places(self) -> tuple[int, int, int]:
        """Where the criterion begins to decide, where the polynomial takes over, and where every step is computed."""
        total = len(self.times)
        scaled = [round(total * share / 50) for share in (10, 24, 47)]
        fourth = max(1, round(scaled[1] / self.interval)) * self.interval
        return max(3, scaled[0]), fourth if self.polynomial else scaled[2], scaled[2]

    def full(self, _index: int) -> bool:
        """Whether a step is computed."""
        return not self.skip

    def computed(self, index: int, x: torch.Tensor, prediction: torch.Tensor) -> None:
        """Note what a computed step predicted."""
        self.prediction = prediction
        self._note(index, x, self.conversion.to("sample", prediction, x, self.times[index]))

    def forecast(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The prediction of a step that is left out."""
        assert self.prediction is not None and self.ahead is not None
        if self.by_polynomial and self.kept:
            clean = lagrange(self.kept_steps, self.kept, index)
        else:
            clean = self.conversion.to("sample", self.prediction, self.ahead, self.times[index])
        self._note(index, x, clean)
        return self.conversion.back("sample", clean, x, self.times[index])

    def _note(self, index: int, x: torch.Tensor, clean: torch.Tensor) -> None:
        assert self.prediction is not None
        if index % self.interval == 1:
            self.kept_steps, self.kept = [*self.kept_steps[-3:], index], [*self.kept[-3:], clean]
        self.slopes = [slope(self.conversion, self.prediction, x, self.times[index]), *self.slopes[:2]]
        self.now = x

    def arrived(self, index: int, x_next: torch.Tensor) -> None:
        """Decide about the step behind `index`, which begins with the latents `x_next`."""
        first, fourth, last = self.places
        self.skip, self.by_polynomial = False, False
        if len(self.slopes) < 3 or index + 1 >= len(self.times) or self.now is None:
            return
        self.ahead = adams_moulton(self.now, self.slopes, self.times[index] - self.times[index + 1])
        if self.held < self.most:
            if fourth <= index < last:
                self.skip = self.by_polynomial = index % self.interval != 0
            elif first <= index < fourth:
                self.skip = instability(x_next, self.ahead, self.slopes) <= 0
        self.held = self.held + 1 if self.skip else 0


@dataclass
class EasyCache:
    """EasyCache (Zhou et al. 2025, arXiv 2507.02860), TeaCache's idea on the whole model without fitted polynomials.

    How much the output changes for a change of the input is measured at computed steps; times the relative change of
    the input since the step before it is added up, and below the threshold a step is left out: what the last output
    added to its input is added to the present one. The first fifth and the last step are computed (10 of 50 in the
    released code). Decided here: outputs are those after guidance (released: of the conditional branch), and one
    decision holds for all images of a batch.
    """

    threshold: float
    total: int
    input: torch.Tensor | None = None  # of the step before
    computed_input: torch.Tensor | None = None
    output: torch.Tensor | None = None
    added: torch.Tensor | None = None
    rate: float | None = None
    sum: float = 0.0
    skip: bool = False

    def full(self, _index: int) -> bool:
        """Whether a step is computed."""
        return not self.skip

    def computed(self, _index: int, x: torch.Tensor, prediction: torch.Tensor) -> None:
        """Note what a computed step predicted."""
        if self.output is not None and self.computed_input is not None:
            self.rate = _size(prediction - self.output) / max(1e-12, _size(x - self.computed_input))
        self.input = self.computed_input = x
        self.output = prediction
        self.added = prediction[:, : x.shape[1]] - x

    def forecast(self, _index: int, x: torch.Tensor) -> torch.Tensor:
        """The prediction of a step that is left out."""
        assert self.added is not None and self.output is not None
        return torch.cat([x + self.added, self.output[:, x.shape[1] :]], 1)

    def arrived(self, index: int, x_next: torch.Tensor) -> None:
        """Decide about the step behind `index`, which begins with the latents `x_next`."""
        following, self.skip = index + 1, False
        if following < self.total // 5 or following >= self.total - 1:
            self.sum = 0.0
        elif self.rate is not None and self.input is not None and self.output is not None:
            self.sum += self.rate * _size(x_next - self.input) / max(1e-12, _size(self.output))
            self.skip = self.sum < self.threshold
            self.sum = self.sum if self.skip else 0.0
        self.input = x_next


def _size(values: torch.Tensor) -> float:
    return float(values.abs().double().mean())
