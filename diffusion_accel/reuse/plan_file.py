"""Tuned plans as files: the plan, what it is valid for, and what it cost and kept where it was measured."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion_accel._version import __version__
from diffusion_accel.arguments import with_old_keywords
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import read_json, replacing, shown

from .plan import Kinds, Plan, PlanSource

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FORMAT = "diffusion-accel reuse plan"
VERSION = 1
SHIPPED = Path(__file__).parent.parent / "assets" / "plans"
LEVELS = ("quality", "balanced", "fast")


def is_tuned(text: str) -> bool:
    """Whether `Reuse.plan` names a tuned plan: "tuned:NAME", "tuned:FILE", or a path that ends in .json."""
    return text.startswith("tuned:") or text.endswith(".json")


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
    """

    plan: Plan
    conditions: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)

    origin: str = field(default="", compare=False)
    runtime: ClassVar[str] = "diffusion_accel.reuse.conditions"

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

    @with_old_keywords(pipeline="pipe")
    def check(self, pipe: DiffusionPipeline) -> None:
        """Log how a pipeline differs from the one that the plan was tuned for, and which shipped plan fits it."""
        self._runtime().check(self, pipe)

    # ------------------------------------------------------------------ files
    def to_dict(self) -> dict[str, Any]:
        """What is in its file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "plan": [str(step) for step in self.plan.steps],
            "conditions": self.conditions,
            "measured": self.measured,
            "search": self.search,
            "made_by": f"diffusion-accel {__version__}",
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "the plan", origin: str = "") -> TunedPlan:
        """The inverse of `to_dict`; errors begin with `where`. Raises `ConfigurationError`."""
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
            return cls(Plan.parse(tokens), conditions, measured, search, origin)
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}: {error}") from error

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Write as JSON, complete or not at all. Raises `ConfigurationError` if the file exists."""
        if path.exists() and not overwrite:
            raise ConfigurationError(f"{path} exists; overwrite replaces it")
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, text: str) -> TunedPlan:
        """From a file, or one of the shipped plans by "tuned:NAME".

        Raises:
            ConfigurationError: there is no such file, or it is not a plan of this version.
        """
        name = text.removeprefix("tuned:")
        path = Path(name)
        if text.startswith("tuned:") and (SHIPPED / f"{name}.json").is_file() and "/" not in name:
            path = SHIPPED / f"{name}.json"
        try:
            values = read_json(path, "the plan")
        except ConfigurationError as error:
            raise ConfigurationError(f"{error}; shipped plans: {', '.join(shipped()) or 'none'}") from error
        return cls.from_dict(values, str(path), text)

    @classmethod
    def parse(cls, text: str) -> TunedPlan:
        """The same as `load`: the text of a tuned plan is where it lies."""
        return cls.load(text)


@functools.cache
def shipped_plans() -> dict[str, TunedPlan]:
    """The shipped plans by name, read once."""
    return {name: TunedPlan.load(f"tuned:{name}") for name in shipped()}


def shipped() -> list[str]:
    """The names of the plans that ship with the embedded model, behind "tuned:"."""
    return sorted(file.stem for file in SHIPPED.glob("*.json"))
