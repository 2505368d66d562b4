"""Tuned plans as files: the plan, what it is valid for, and what it cost and kept where it was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion_accel._version import __version__
from diffusion_accel.arguments import with_old_keywords
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import read_json, replacing, shown

from .plan import Kinds, Plan, PlanSource
from .plan_names import Place, may_name, names_of, place_of, shipped_texts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FORMAT = "diffusion-accel reuse plan"
FAMILY = "diffusion-accel plan family"
VERSION = 1
MOST_DECIBELS, MOST_SPEEDUP = 200.0, 10_000.0  # of what was measured


@dataclass(frozen=True)
class TunedPlan(PlanSource):
    """A plan with its conditions and measurements.

    Attributes:
        plan: the steps.
        conditions: see `diffusion_accel.reuse.conditions`; also "call", the
            arguments of the calibration, for the record.
        measured: cost and fidelity on prompts that the search did not see.
        search: how it was found.
        origin: what it was loaded by, a path or "tuned:NAME"; empty: it was made here.
        name: what it is called in a family, such as "balanced"; empty: it has no name.
    """

    plan: Plan
    conditions: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)

    origin: str = field(default="", compare=False)
    name: str = ""
    runtime: ClassVar[str] = "diffusion_accel.reuse.conditions"

    def __post_init__(self) -> None:
        if self.name != "" and not may_name(self.name):
            raise ConfigurationError(
                f"the name of a plan has small letters, digits and dashes, no digits alone, got {shown(self.name)}"
            )

    def __str__(self) -> str:
        return self.origin or str(self.plan)

    @property
    def text(self) -> str:
        """The name that it was loaded by; its steps if it was not."""
        return self.origin or self.plan.text

    def for_steps(self, total: int) -> Plan:
        """Its plan, stretched to so many steps."""
        return self.plan.for_steps(total)

    def kinds(self) -> Kinds:
        """The steps of its plan."""
        return self.plan.kinds()

    @property
    def made_for(self) -> int:
        """The number of steps that it was tuned for."""
        return len(self.plan)

    # --------------------------------------------------------------- what was measured
    @property
    def speedup(self) -> float | None:
        """Times as fast as the baseline, of the whole call; None if it was not measured."""
        return self._number("time_ratio", 0.0, MOST_SPEEDUP)

    @property
    def evaluations(self) -> int:
        """How many of its steps run the whole denoiser."""
        return sum(step.mode == "full" for step in self.plan.steps)

    @property
    def psnr_median(self) -> float | None:
        """Median over the held-out images, in dB; None if it was not measured."""
        return self._number("psnr_median")

    @property
    def psnr_worst_decile(self) -> float | None:
        """What nine of ten held-out images reach, in dB; None if it was not measured."""
        return self._number("psnr_worst_decile")

    @property
    def psnr_floor(self) -> float | None:
        """What a new image reaches with the probability `measured["floor_share"]`, in dB; None if it is not known. See
        `diffusion_accel.measure.fidelity.conformal_floor`."""
        return self._number("psnr_floor")

    def _number(self, key: str, least: float = -MOST_DECIBELS, most: float = MOST_DECIBELS) -> float | None:
        value = self.measured.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        return float(value) if math.isfinite(value) and least < value <= most else None

    @with_old_keywords(pipeline="pipe")
    def check(self, pipe: DiffusionPipeline, arguments: Mapping[str, Any] | None = None) -> None:
        """Log how a pipeline differs from the one that the plan was tuned for, and which shipped plan fits it; also how
        `arguments` of a call differ from those of the calibration."""
        self._runtime().check(self, pipe, arguments or {})

    # ------------------------------------------------------------------ files
    def to_dict(self) -> dict[str, Any]:
        """What is in its file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            **({"name": self.name} if self.name else {}),
            "plan": [str(step) for step in self.plan.steps],
            "conditions": self.conditions,
            "measured": self.measured,
            "search": self.search,
            "made_by": f"diffusion-accel {__version__}",
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "the plan", origin: str = "") -> TunedPlan:
        """The inverse of `to_dict`; errors begin with `where`. Raises `ConfigurationError`."""
        if isinstance(values, dict) and values.get("format") == FAMILY:
            raise ConfigurationError(f"{where} is a family of plans, not one plan; {_one_of(values)}")
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ConfigurationError(f"{where} is not a reuse plan; make one with diffusion-accel tune")
        if values.get("version") != VERSION:
            raise ConfigurationError(
                f"{where} is a plan of version {shown(values.get('version'))}, this program reads version {VERSION}"
            )
        tokens = values.get("plan")
        if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
            raise ConfigurationError(f"{where}: plan must be a list of steps")
        tables = [values.get("conditions"), values.get("measured", {}), values.get("search", {})]
        if not all(isinstance(table, dict) for table in tables):
            raise ConfigurationError(f"{where}: conditions, measured and search must be objects")
        try:
            conditions, measured, search = tables
            return cls(Plan.parse(tokens), conditions, measured, search, origin, values.get("name", ""))
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}: {error}") from error

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Write as JSON, complete or not at all. Raises `ConfigurationError` if the file exists."""
        write_plan_file(path, self.to_dict(), overwrite)

    @classmethod
    def load(cls, text: str | Path) -> TunedPlan:
        """From a file, one of a family's file ("FILE.json:NAME"), or one of the shipped plans by "tuned:NAME".

        Raises:
            ConfigurationError: there is no such file or plan in it, or it is not a plan of this version.
        """
        return cls.from_place(*read_plan_file(str(text)), str(text))

    @classmethod
    def from_place(cls, values: Any, place: Place, text: str) -> TunedPlan:
        """The plan at a place in a file's JSON value; `text` is what it was loaded by. Raises `ConfigurationError`."""
        return cls.from_dict(member_of(values, place) if place.member else values, str(place.path), text)

    @classmethod
    def parse(cls, text: str) -> TunedPlan:
        """The same as `load`: the text of a tuned plan is where it lies."""
        return cls.load(text)


def write_plan_file(path: Path, values: dict[str, Any], overwrite: bool) -> None:
    """Write what a file of tuned plans has, complete or not at all. Raises `ConfigurationError` if the file exists."""
    if path.exists() and not overwrite:
        raise ConfigurationError(f"{path} exists; overwrite replaces it")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_plan_file(text: str) -> tuple[Any, Place]:
    """The JSON value in the file that a text means, and which plan in it. Raises `ConfigurationError`."""
    place = place_of(text)
    try:
        return read_json(place.path, "the plan"), place
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}; shipped plans: {shipped_texts()}") from error


def member_of(values: Any, place: Place) -> dict[str, Any]:
    """One plan of a family's JSON value, as its own file would have it. Raises `ConfigurationError`."""
    members = values.get("members") if isinstance(values, dict) and values.get("format") == FAMILY else None
    if not isinstance(members, list):
        raise ConfigurationError(f"{place.path} is no family of plans, so there is no {place.member} in it")
    for name, member in zip(names_of(members), members, strict=True):
        if name == place.member and isinstance(member, dict):
            return as_file(member, values)
    raise ConfigurationError(f"{place.path} has no plan {place.member}; {_one_of(values)}")


def as_file(member: dict[str, Any], family: dict[str, Any]) -> dict[str, Any]:
    """A member of a family's JSON value with what all of them share."""
    return {**member, "format": FORMAT, "conditions": family.get("conditions")}


def _one_of(values: dict[str, Any]) -> str:
    members = values.get("members")
    names = names_of(members[:20]) if isinstance(members, list) else []
    return f"its plans are called by FILE.json:NAME, of which there are: {', '.join(names) or 'none'}"
