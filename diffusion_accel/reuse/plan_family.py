"""Families: one file with the tuned plans of every speed, of which each call follows one."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion_accel._version import __version__
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import printable, shown
from diffusion_accel.schedulers.in_family import apart

from .auto import Auto
from .plan import Kinds, Plan, PlanSource
from .plan_file import FAMILY, VERSION, TunedPlan, as_file, read_plan_file, write_plan_file
from .plan_names import may_name, names_of, shipped_families, text_of_member

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusion_accel.schedulers.learned import LearnedMultistepScheduler

MOST = 64  # plans, and solvers, of a family
SOLVER_LIMIT = 2**20  # characters of a solver's JSON
USUAL_FLOOR = 40.0  # dB; nine of ten images of the plan that is chosen where nothing is asked reach it


@dataclass(frozen=True)
class PlanFamily(PlanSource):
    """Tuned plans of one model, scheduler and number of steps, from the most faithful to the fastest.

    Where it is a source of plans itself, it stands for the one that `choose()` gives.

    Attributes:
        members: plans with the same conditions; they are kept by speed-up, the slowest first. Each has a measured
            speed-up, median and worst decile; a name of its own, such as "balanced", or none.
        conditions: those of every member, see `TunedPlan`.
        solvers: learned solvers by name, each {"config": …, "measured": …}; see `with_solvers`.
        search: how the family was found.
        origin: what it was loaded by, a path or "tuned:NAME"; empty: it was made here.
    """

    members: tuple[TunedPlan, ...]
    conditions: dict[str, Any]
    solvers: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)

    origin: str = field(default="", compare=False)
    runtime: ClassVar[str] = "diffusion_accel.reuse.conditions"

    def __post_init__(self) -> None:
        if len(self.members) > MOST or (not self.members and not self.solvers):
            raise ConfigurationError(f"a family has 1 to {MOST} plans, got {len(self.members)}")
        _check_solvers(self.solvers)
        for plan in self.members:
            _check_member(plan, self)
        object.__setattr__(self, "members", tuple(sorted(self.members, key=lambda plan: plan.speedup or 0.0)))
        if len({*self.names}) < len(self.members):
            raise ConfigurationError("two plans of a family have the same name")

    def __str__(self) -> str:
        return self.origin or self.choose().text

    @property
    def text(self) -> str:
        """The name that it was loaded by; the steps of its usual plan if it was not."""
        return str(self)

    @property
    def names(self) -> tuple[str, ...]:
        """What the members are called by, behind the file: their names, or their numbers, from 1."""
        return tuple(plan.name or str(number) for number, plan in enumerate(self.members, 1))

    # ------------------------------------------------------------------ one of them
    def choose(self, speedup: float | None = None, min_psnr: float | None = None) -> TunedPlan:
        """The plan for a speed-up or a fidelity, by what was measured.

        - `speedup`: of the plans that are at least so fast the one of the best worst decile, then of the best median.
        - `min_psnr`: the fastest of the plans whose median is at least that. It is the median that counts: one image
          of two is below it; `psnr_worst_decile` and `psnr_floor` say how far.
        - both: the fastest of those that satisfy both.
        - neither: the fastest plan whose worst decile is at least 40 dB, which few people can tell from the baseline,
          else the one of the best worst decile.

        Raises:
            ConfigurationError: none of them does that; the error lists what there is.
        """
        enough = [plan for plan in self.members if reaches(plan, speedup, min_psnr)]
        if speedup is None and min_psnr is None:
            near = [plan for plan in enough if (plan.psnr_worst_decile or 0.0) >= USUAL_FLOOR]
            found = max(near, key=_speed) if near else max(enough, key=_nearness, default=None)
        else:
            found = max(enough, key=_nearness if min_psnr is None else _speed, default=None)
        if found is None:
            raise ConfigurationError(_nothing_for(self, speedup, min_psnr))
        return found

    def for_steps(self, total: int) -> Plan:
        """That of the usual plan."""
        return self.choose().for_steps(total)

    def kinds(self) -> Kinds:
        """The steps of the usual plan."""
        return self.choose().kinds()

    @property
    def made_for(self) -> int:
        """The number of steps that its plans were tuned for."""
        return self.choose().made_for

    def supports(self, pipe: DiffusionPipeline) -> str | None:
        """Why a pipeline cannot follow its usual plan; None if it can."""
        return self.choose().supports(pipe)

    def check(self, pipe: DiffusionPipeline, arguments: Mapping[str, Any] | None = None) -> None:
        """Log how a pipeline, or a call with `arguments`, differs from what the plans were tuned for."""
        self.choose().check(pipe, arguments)

    # ------------------------------------------------------------------ files
    @classmethod
    def of(
        cls,
        plans: Sequence[TunedPlan],
        names: Sequence[str] = (),
        solvers: dict[str, Any] | None = None,
        search: dict[str, Any] | None = None,
    ) -> PlanFamily:
        """Several tuned plans as one family.

        Args:
            plans: of the same conditions, each measured.
            names: of the plans, in the order given; those behind the last one keep their own, if they have any.
            solvers, search: see the class.

        Raises:
            ConfigurationError: they are for different models, schedulers or steps, or were not measured.
        """
        if not plans or len(names) > len(plans):
            raise ConfigurationError(f"a family is made of plans, and at most as many names, got {len(plans)} plans")
        named = [replace(plan, origin="", name=name) for plan, name in zip(plans, names, strict=False)]
        named += [replace(plan, origin="") for plan in plans[len(names) :]]
        return cls(tuple(named), plans[0].conditions, solvers or {}, search or {})

    def with_solvers(self, scheduler: LearnedMultistepScheduler) -> PlanFamily:
        """This family and the solvers of a learned scheduler, by their numbers of evaluations, in one file.

        `--scheduler FILE` and `AcceleratedPipeline.from_pretrained(..., scheduler=FILE)` take them from there.
        """
        return replace(self, solvers=self.solvers | apart(json.loads(scheduler.to_json_string())))

    def to_dict(self) -> dict[str, Any]:
        """What is in its file."""
        shared = ("format", "conditions", "made_by")
        return {
            "format": FAMILY,
            "version": VERSION,
            "conditions": self.conditions,
            "members": [{k: v for k, v in plan.to_dict().items() if k not in shared} for plan in self.members],
            "solvers": self.solvers,
            "search": self.search,
            "made_by": f"diffusion-accel {__version__}",
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "the family", origin: str = "") -> PlanFamily:
        """The inverse of `to_dict`; errors begin with `where`. Raises `ConfigurationError`."""
        if not isinstance(values, dict) or values.get("format") != FAMILY:
            raise ConfigurationError(f"{where} is not a family of plans; make one with diffusion-accel tune")
        if values.get("version") != VERSION:
            raise ConfigurationError(
                f"{where} is a family of version {shown(values.get('version'))}, this program reads version {VERSION}"
            )
        members: Any = values.get("members")
        conditions: Any = values.get("conditions")
        if not isinstance(members, list) or len(members) > MOST or not all(isinstance(m, dict) for m in members):
            raise ConfigurationError(f"{where}: members must be a list of at most {MOST} plans")
        solvers, search = values.get("solvers", {}), values.get("search", {})
        if not all(isinstance(table, dict) for table in (conditions, solvers, search)):
            raise ConfigurationError(f"{where}: conditions, solvers and search must be objects")
        plans = [
            TunedPlan.from_dict(as_file(member, values), f"{where}, plan {name}", text_of_member(origin, name))
            for name, member in zip(names_of(members), members, strict=True)
        ]
        try:
            made = cls(tuple(plans), conditions, solvers, search, origin)
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}: {error}") from error
        if made.members != tuple(plans):
            raise ConfigurationError(f"{where}: its plans must be in order of their speed-up, the slowest first")
        return made

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Write as JSON, complete or not at all. Raises `ConfigurationError` if the file exists."""
        write_plan_file(path, self.to_dict(), overwrite)

    @classmethod
    def load(cls, text: str | Path) -> PlanFamily:
        """From a file, or one of the shipped families by "tuned:NAME".

        Raises:
            ConfigurationError: there is no such file, or it is not a family of this version.
        """
        found = load_tuned(str(text))
        if not isinstance(found, PlanFamily):
            raise ConfigurationError(
                f"{printable(str(text))} is one plan, not a family of plans; TunedPlan.load reads it"
            )
        return found

    @classmethod
    def parse(cls, text: str) -> PlanFamily:
        """The same as `load`: the text of a family is where it lies."""
        return cls.load(text)


def load_tuned(text: str) -> TunedPlan | PlanFamily:
    """What is in a file of tuned plans: one plan, a family, or the plan of a family that the text names.

    Raises:
        ConfigurationError: there is no such file or plan in it, or it is of another version.
    """
    values, place = read_plan_file(text)
    if not place.member and isinstance(values, dict) and values.get("format") == FAMILY:
        return PlanFamily.from_dict(values, str(place.path), text)
    return TunedPlan.from_place(values, place, text)


def chosen(source: PlanSource, speedup: float | None, min_psnr: float | None) -> PlanSource:
    """The plan of a family for a speed-up or a fidelity; anything else is itself, if it is known to reach them.

    Raises:
        ConfigurationError: no plan reaches them, or nothing was measured of this one.
    """
    if isinstance(source, PlanFamily):
        return source.choose(speedup, min_psnr)
    if isinstance(source, Auto):
        return source.at(speedup, min_psnr)
    if speedup is None and min_psnr is None:
        return source
    if not isinstance(source, TunedPlan):
        families = ", ".join(f"tuned:{name}" for name in shipped_families())
        raise ConfigurationError(
            f"speedup and min_psnr choose among tuned plans, by what was measured of them, and {shown(source.text)} is "
            f"none; give the file of a tuned family, or {families}"
        )
    if not reaches(source, speedup, min_psnr):
        raise ConfigurationError(_nothing_for(source, speedup, min_psnr))
    return source


def reaches(plan: TunedPlan, speedup: float | None, min_psnr: float | None) -> bool:
    """Whether a plan was measured to be so fast, and so near in the median."""
    fast = speedup is None or (plan.speedup is not None and plan.speedup >= speedup)
    return fast and (min_psnr is None or (plan.psnr_median is not None and plan.psnr_median >= min_psnr))


def called(plan: TunedPlan) -> str:
    """What a plan of a family is called: its name, else its number in the file."""
    return plan.name or plan.origin.rpartition(":")[2]


def numbers_of(plan: TunedPlan) -> dict[str, float | None]:
    """What was measured of a plan, as tables and reports show it: times as fast, whole evaluations, decibels."""
    return {
        "speedup": plan.speedup,
        "evaluations": plan.evaluations,
        "psnr_median": plan.psnr_median,
        "psnr_worst_decile": plan.psnr_worst_decile,
        "psnr_floor": plan.psnr_floor,
    }


def in_words(plan: TunedPlan) -> str:
    """What was measured of a plan, shortly and rounded down: "3.14x 62.4 dB" reaches a speed-up of 3.14."""
    return f"{down(plan.speedup, 2)}x {down(plan.psnr_median, 1)} dB"


def down(value: float | None, digits: int = 0) -> str:
    """A number that is promised, with at most so many digits behind the point: never more than was measured."""
    return "?" if value is None else f"{math.floor(value * 10**digits + 1e-6) / 10**digits:g}"


@functools.cache
def load_shipped() -> dict[str, PlanFamily]:
    """The shipped families by name, read once."""
    return {name: PlanFamily.load(f"tuned:{name}") for name in shipped_families()}


def _speed(plan: TunedPlan) -> tuple[float, ...]:
    return (plan.speedup or 0.0, *_nearness(plan)[:2])


def _nearness(plan: TunedPlan) -> tuple[float, ...]:
    return (plan.psnr_worst_decile or 0.0, plan.psnr_median or 0.0, plan.speedup or 0.0)


def _nothing_for(source: TunedPlan | PlanFamily, speedup: float | None, min_psnr: float | None) -> str:
    wanted = [] if speedup is None else [f"at least {speedup:g} times as fast"]
    wanted += [] if min_psnr is None else [f"at {min_psnr:g} dB or more"]
    name = printable(source.origin)[-80:]
    if isinstance(source, TunedPlan):
        known = f"measured: {in_words(source)}" if source.measured else "it says of no measurement"
        return f"the plan {name or 'given'} is not known to be {' '.join(wanted)}; {known}"
    if not source.members:
        return f"the family {name} has no plans, only solvers"
    there = ", ".join(map(in_words, source.members))
    return f"no plan of {name or 'the family'} is {' '.join(wanted)}; there are {there}"


def _check_member(plan: TunedPlan, family: PlanFamily) -> None:
    """Raise `ConfigurationError` for a plan that does not belong to the others, or of which too little is known."""
    what = f"the plan {plan.name}" if plan.name else "a plan of the family"
    if plan.conditions != family.conditions:
        raise ConfigurationError(f"{what} is for another model, scheduler, number of steps or call than the family")
    if len(plan.plan) != len(family.members[0].plan):
        raise ConfigurationError(f"{what} has {len(plan.plan)} steps, another one {len(family.members[0].plan)}")
    if None in (plan.speedup, plan.psnr_median, plan.psnr_worst_decile):
        raise ConfigurationError(f"{what} has no measured time_ratio, psnr_median and psnr_worst_decile")


def _check_solvers(solvers: dict[str, Any]) -> None:
    known = all(may_name(name, numbers=True) and isinstance(solver, dict) for name, solver in solvers.items())
    if len(solvers) > MOST or not known:
        raise ConfigurationError(f"solvers must be at most {MOST} objects by name, each with config and measured")
    for name, solver in solvers.items():
        if not {*solver} <= {"config", "measured"} or not all(isinstance(part, dict) for part in solver.values()):
            raise ConfigurationError(f"the solver {name} must have config and measured, both objects")
        if len(json.dumps(solver)) > SOLVER_LIMIT:
            raise ConfigurationError(f"the solver {name} has more than {SOLVER_LIMIT} characters")
