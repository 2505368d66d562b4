"""Steps: what one denoising step of a plan computes, reuses or forecasts, as values and as text."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

from diffusion_accel import combination
from diffusion_accel.combination import Combination
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.field_values import is_a
from diffusion_accel.io import shown

MODES = ("full", "decoder", "shallow", "hold")
GUIDANCE = ("both", "reuse", "none")
SPACES = ("", "epsilon", "sample")
MAX_ORDER = 3
MAX_STEPS = 10_000  # of a plan, and between two full steps of a preset
MAX_DEPTH = 1_000
MAX_WEIGHT = 10_000.0
_NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"
MAX_GUIDANCE_WEIGHT = 10.0
_TOKEN = re.compile(
    r"(decoder|(?:full|hold)(?::(epsilon|sample))?|shallow:([1-9][0-9]*))"
    rf"(?:=({_NUMBER}(?:,{_NUMBER}){{0,3}})|(?:=({combination.PATTERN}))?(?:@([0-3]))?)"
    r"(?:/(reuse|none)(?:\*([0-9]{1,5}(?:\.[0-9]{1,12})?))?)?"
)


def bounded(weight: float) -> float:
    """A weight as a plan may have it."""
    return max(-MAX_WEIGHT, min(MAX_WEIGHT, weight))


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    Attributes:
        mode: "full": the whole denoiser; "decoder": a U-Net's decoder on reused encoder features (Faster Diffusion);
            "shallow": only the `depth` outermost levels, on a reused deep feature (DeepCache); "hold": nothing is
            computed, the prediction is reused.
        depth: of "shallow": how many skip connections of a U-Net are computed, from the outside (DeepCache's branch
            + 1), or how many blocks of a transformer, half of them at its beginning and half at its end.
        space: of "hold", or of a `fit`: what is forecast: "" the prediction as it is, "epsilon" the noise that it
            means, "sample" the clean sample. The last two become a prediction with the latents of their own step.
        order: what is reused is taken as it was (0), or forecast in time by a polynomial of this degree through the
            last full steps (at most 3).
        weights: of "hold", instead of an order: what the last computed predictions count in the forecast, the newest
            first (at most 4, of four decimals; the order follows from them). Fitted by the tuner.
        guidance: "both": with and without the prompt; "reuse": only with it, and the difference between the two is
            the forecast one; "none": only with it, and no guidance (limited-interval guidance, Kynkäänniemi 2024).
        fit: of "hold", instead of order and weights: the prediction that the scheduler is given, after guidance, is
            this combination of those of the last full steps, of the latents now, at the last full step, at the one
            before it, …, and of what guidance added at the last full steps, the guided prediction minus the
            conditional one. Of "full": it is computed and corrected, which is the combination of its own prediction,
            those of the full steps before it, the latents now and at these, and its own addition and those before. As
            numbers for each channel of the latents, or for all. Without as many full steps before it a step does the
            same as without a fit.
        guidance_weight: of "full" with guidance "reuse": what the forecast difference of the branches counts (0 … 10,
            of four decimals).
    """

    mode: str = "full"
    depth: int = 0
    order: int = 0
    guidance: str = "both"
    space: str = ""
    weights: tuple[float, ...] = ()
    fit: Combination | None = None
    guidance_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weights:
            object.__setattr__(self, "weights", tuple(round(weight, 4) for weight in self.weights))
            object.__setattr__(self, "order", len(self.weights) - 1)
        known = self.mode in MODES and self.guidance in GUIDANCE and self.space in SPACES
        if not known or not 0 <= self.order <= MAX_ORDER or (self.mode == "shallow") != (0 < self.depth <= MAX_DEPTH):
            raise ConfigurationError(
                f"a step has a mode ({', '.join(MODES)}), an order of 0 to {MAX_ORDER}, guidance "
                f"({', '.join(GUIDANCE)}) and, if it is shallow, a depth of 1 to {MAX_DEPTH}; got {shown(vars(self))}"
            )
        if self.mode != "hold" and (self.weights or (self.space and self.fit is None)):
            raise ConfigurationError(
                f"only hold has a space or weights, and full a space with a fit, got {shown(vars(self))}"
            )
        if not all(abs(weight) <= MAX_WEIGHT for weight in self.weights):
            raise ConfigurationError(f"a weight of hold must be at most {MAX_WEIGHT:g}, got {shown(self.weights)}")
        self._check_fit()

    def _check_fit(self) -> None:
        if self.fit is not None:
            ordered = self.weights or (self.order and self.mode == "hold")
            other = self.mode not in ("full", "hold") or self.guidance == "none" or ordered
            if other or not isinstance(self.fit, Combination):
                raise ConfigurationError(
                    "only full and hold have a fit, which is a Combination, with guidance both or reuse and, for hold, "
                    f"instead of an order or weights; got {shown(vars(self))}"
                )
        weight = self.guidance_weight
        if not is_a(weight, float) or not 0 <= weight <= MAX_GUIDANCE_WEIGHT:
            raise ConfigurationError(
                f"a weight of guidance must be a number of 0 to {MAX_GUIDANCE_WEIGHT:g}, got {shown(weight)}"
            )
        object.__setattr__(self, "guidance_weight", round(float(weight), 4) + 0.0)
        if self.guidance_weight != 1 and (self.mode != "full" or self.guidance != "reuse"):
            raise ConfigurationError(f"only full/reuse has a weight of guidance, got {shown(vars(self))}")

    def unfitted(self) -> Step:
        """The same without what was fitted to its place: a polynomial through as many full steps stands for weights,
        the newest value in the same space for the fit of a held step."""
        space = self.space if self.mode == "hold" else ""
        return replace(self, space=space, weights=(), fit=None, guidance_weight=1.0)

    def __str__(self) -> str:
        text = self.mode
        text += f":{self.depth}" if self.mode == "shallow" else ""
        text += f":{self.space}" if self.space else ""
        if self.fit is not None:
            text += f"={self.fit}"
        if self.weights:
            text += "=" + ",".join(f"{weight:.4f}" for weight in self.weights)
        elif self.order:
            text += f"@{self.order}"
        text += f"/{self.guidance}" if self.guidance != "both" else ""
        return text + (f"*{self.guidance_weight:.4f}".rstrip("0").rstrip(".") if self.guidance_weight != 1 else "")

    @classmethod
    def parse(cls, token: str) -> Step:
        """The inverse of `str`, such as "full", "hold@2", "shallow:1@1/reuse", "hold:sample=1.2,-0.2;0.01"."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise ConfigurationError(
                "a step of a plan is full, decoder, shallow:DEPTH, hold, hold:epsilon or hold:sample, then @ORDER and "
                f"/reuse or /none if wanted, such as hold@2 (the order is at most {MAX_ORDER}); hold also =WEIGHTS, "
                "such as hold=1.5,-0.5; full and hold =FIT, such as hold:sample=1.5,-0.5;0.01;0.02; full "
                f"/reuse*WEIGHT; got {shown(token)}"
            )
        mode, space, depth, numbers, fit, order, guidance, weight = match.groups()
        mode, given = mode.partition(":")[0], tuple(float(n) for n in (numbers or "").split(",") if n)
        if given and mode != "hold":
            raise ConfigurationError(f"only hold takes weights, got {shown(token)}")
        if any(abs(weight) > MAX_WEIGHT for weight in given):
            raise ConfigurationError(f"a weight of hold must be at most {MAX_WEIGHT:g}, got {shown(token)}")
        if len(depth or "") > 4 or int(depth or 0) > MAX_DEPTH:
            raise ConfigurationError(f"the depth of a shallow step must be at most {MAX_DEPTH}, got {shown(token)}")
        degree = len(given) - 1 if given else int(order or 0)
        fitted = None if fit is None else Combination.parse(fit)
        share = 1.0 if weight is None else float(weight)
        return cls(mode, int(depth or 0), degree, guidance or "both", space or "", given, fitted, share)


FULL = Step()


class Kinds(frozenset[Step]):
    """A step of every kind that the plans of one source have: what must be hooked and kept for them follows from it."""

    @functools.cached_property
    def depths(self) -> frozenset[int]:
        """The depths of the shallow steps."""
        return frozenset(step.depth for step in self if step.mode == "shallow")

    def orders(self, mode: str, depth: int = 0) -> int:
        """The highest order of the steps of this mode (and depth); −1 if there is none."""
        return max((s.order for s in self if s.mode == mode and s.depth == depth), default=-1)

    @functools.cached_property
    def spaces(self) -> dict[str, int]:
        """The spaces in which the denoiser's predictions are kept for held steps, with the highest order in each."""
        held = [(step.space, step.order) for step in self if step.mode == "hold"]
        held += [("", 0) for step in self if step.mode == "hold" and step.fit is not None]
        return {space: max(order for s, order in held if s == space) for space, _ in held}

    @functools.cached_property
    def fitted(self) -> bool:
        """Whether a step has a fit."""
        return any(step.fit is not None for step in self)

    @functools.cached_property
    def fitted_spaces(self) -> frozenset[str]:
        """The spaces of the steps that have one."""
        return frozenset(step.space for step in self if step.fit is not None)

    @functools.cached_property
    def looks_back(self) -> int:
        """Of how many full steps before them the steps with a fit need predictions or latents."""
        own = {"full": 1, "hold": 0}  # its own prediction
        fits = [(s.fit, own[s.mode]) for s in self if s.fit is not None]
        return max((max(max(f.count, f.count_additions) - n, f.count_latents - 1) for f, n in fits), default=0)

    @functools.cached_property
    def needs_additions(self) -> bool:
        """Whether a fit needs what guidance adds."""
        return any(step.fit is not None and step.fit.count_additions for step in self)

    @functools.cached_property
    def highest_order(self) -> int:
        """The highest order of a forecast; 0 if nothing is forecast."""
        return max(step.order for step in self)

    @functools.cached_property
    def reuses_guidance(self) -> bool:
        """Whether a step adds the difference of the branches of guidance that earlier steps left."""
        return any(step.guidance == "reuse" for step in self)

    @functools.cached_property
    def leaves_branches_out(self) -> bool:
        """Whether a step computes one branch of guidance only."""
        return any(step.guidance != "both" for step in self)

    @functools.cached_property
    def parts_branches(self) -> bool:
        """Whether the branches of guidance must be told apart."""
        return self.leaves_branches_out or self.needs_additions

    @functools.cached_property
    def inside(self) -> bool:
        """Whether a step needs hooks inside of the denoiser: it runs some of its parts only."""
        return any(step.mode in ("decoder", "shallow") for step in self)
