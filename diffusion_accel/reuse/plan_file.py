"""Tuned plans as files: the plan, what it is valid for, and what it cost and kept where it was measured."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import printable, read_json, replacing, shown

from .plan import Plan

logger = logging.getLogger(__name__)

FORMAT = "diffusion-accel reuse plan"
VERSION = 1
SHIPPED = Path(__file__).parent.parent / "assets" / "plans"
LEVELS = ("quality", "balanced", "fast")


def is_tuned(text: str) -> bool:
    """Whether `Reuse.plan` names a tuned plan: "tuned:NAME", "tuned:FILE", or a path that ends in .json."""
    return text.startswith("tuned:") or text.endswith(".json")


def conditions(pipeline: Any, steps: int) -> dict[str, Any]:
    """What a plan depends on: the denoiser, its weights (None where they are offloaded to another place), the scheduler
    and the number of steps."""
    from diffusion_accel.denoisers import find_denoisers, fingerprint

    denoisers, scheduler = find_denoisers(pipeline), pipeline.scheduler
    config = getattr(scheduler, "config", {})
    kept = ("prediction_type", "timestep_spacing", "algorithm_type", "solver_order", "use_karras_sigmas")
    return {
        "denoiser": _kind(denoisers),
        "weights": None if any(p.is_meta for d in denoisers for p in d.parameters()) else fingerprint(*denoisers),
        "scheduler": type(scheduler).__name__,
        "scheduler_config": {key: config[key] for key in kept if key in config},
        "steps": steps,
    }


def _kind(denoisers: list[Any]) -> str:
    return "+".join(type(denoiser).__name__ for denoiser in denoisers)


@dataclass
class TunedPlan:
    """A plan with its conditions and measurements.

    Attributes:
        plan: the steps.
        conditions: see `conditions`; also "guidance_scale", "height" and "width" of the calibration, for the record.
        measured: cost and fidelity on prompts that the search did not see.
        search: how it was found.
    """

    plan: Plan
    conditions: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path, overwrite: bool = False) -> None:
        """Write as JSON, complete or not at all. Raises `ConfigurationError` if the file exists."""
        if path.exists() and not overwrite:
            raise ConfigurationError(f"{path} exists; pass overwrite (--overwrite) to replace it")
        from diffusion_accel._version import __version__

        values = {
            "format": FORMAT,
            "version": VERSION,
            "plan": [str(step) for step in self.plan.steps],
            "conditions": self.conditions,
            "measured": self.measured,
            "search": self.search,
            "made_by": f"diffusion-accel {__version__}",
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

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
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ConfigurationError(f"{path} is not a reuse plan; make one with diffusion-accel tune")
        if values.get("version") != VERSION:
            raise ConfigurationError(
                f"{path} is a plan of version {shown(values.get('version'))}, this program reads version {VERSION}"
            )
        tokens = values.get("plan")
        if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
            raise ConfigurationError(f"{path}: plan must be a list of steps")
        tables = [values.get("conditions"), values.get("measured", {}), values.get("search", {})]
        if not all(isinstance(table, dict) for table in tables):
            raise ConfigurationError(f"{path}: conditions, measured and search must be objects")
        try:
            return cls(Plan.parse(tokens), *tables)
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: {error}") from error

    def for_another_denoiser(self, denoisers: list[Any]) -> str | None:
        """That the plan was tuned for another class of denoiser; None if it is for this one."""
        made_for = self.conditions.get("denoiser")
        if made_for == _kind(denoisers):
            return None
        name = made_for if isinstance(made_for, str) else "a model that it does not name"
        return f"the plan was tuned for {printable(name)[:80]}, this pipeline has {_kind(denoisers)}"

    def check(self, pipeline: Any) -> None:
        """Log how a pipeline differs from the one that the plan was tuned for, and which shipped plan fits it."""
        here = conditions(pipeline, len(self.plan))
        for key, what in (("weights", "other weights"), ("scheduler", "another scheduler"), ("scheduler_config", "")):
            if here[key] == self.conditions.get(key) or here[key] is None:
                continue
            fitting = [name for name in shipped() if TunedPlan.load(f"tuned:{name}")._same(here)]
            logger.warning(
                "the plan was tuned with %s (%s, here %s): what it was measured to keep does not hold here; %s",
                what or "other settings of the scheduler",
                shown(self.conditions.get(key)),
                shown(here[key]),
                f"plans for what is here: {', '.join(f'tuned:{name}' for name in fitting)}"
                if fitting
                else "make one with diffusion-accel tune",
            )
            return

    def _same(self, here: dict[str, Any]) -> bool:
        keys = ("denoiser", "weights", "scheduler", "scheduler_config")
        return all(here[key] == self.conditions.get(key) for key in keys)


def shipped() -> list[str]:
    """The names of the plans that ship with the embedded model, behind "tuned:"."""
    return sorted(file.stem for file in SHIPPED.glob("*.json"))
