"""Tuned plans as files: the plan, what it is valid for, and what it cost and kept where it was measured."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..io import replacing
from .plan import Plan

logger = logging.getLogger(__name__)

FORMAT = "diffusion-accel reuse plan"
VERSION = 1
SHIPPED = Path(__file__).parent.parent / "assets" / "plans"
LEVELS = ("quality", "balanced", "fast")


def is_tuned(text: str) -> bool:
    """Whether `Reuse.plan` names a tuned plan: "tuned:NAME", "tuned:FILE", or a path that ends in .json."""
    return text.startswith("tuned:") or text.endswith(".json")


def conditions(pipeline: Any, steps: int, weights: str | None = None) -> dict[str, Any]:
    """What a plan depends on: the denoiser, the scheduler and the number of steps.

    `weights`: the denoiser's `fingerprint`, if it is known.
    """
    from ..denoisers import find_denoisers, fingerprint

    denoisers, scheduler = find_denoisers(pipeline), pipeline.scheduler
    config = getattr(scheduler, "config", {})
    kept = ("prediction_type", "timestep_spacing", "algorithm_type", "solver_order", "use_karras_sigmas")
    return {
        "denoiser": "+".join(type(denoiser).__name__ for denoiser in denoisers),
        "weights": weights or fingerprint(*denoisers),
        "scheduler": type(scheduler).__name__,
        "scheduler_config": {key: config[key] for key in kept if key in config},
        "steps": steps,
    }


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
        from .._version import __version__

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
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            known = ", ".join(sorted(f.stem for f in SHIPPED.glob("*.json"))) or "none"
            why = getattr(error, "strerror", None) or "it is not JSON"
            raise ConfigurationError(f"cannot read the plan {name}: {why}; shipped plans: {known}") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ConfigurationError(f"{path} is not a reuse plan; make one with diffusion-accel tune")
        if values.get("version") != VERSION:
            raise ConfigurationError(
                f"{path} is a plan of version {values.get('version')}, this program reads version {VERSION}"
            )
        tokens, valid_for = values.get("plan"), values.get("conditions")
        if (
            not isinstance(tokens, list)
            or not all(isinstance(t, str) for t in tokens)
            or not isinstance(valid_for, dict)
        ):
            raise ConfigurationError(f"{path}: plan must be a list of steps and conditions an object")
        return cls(Plan.parse(tokens), valid_for, values.get("measured", {}), values.get("search", {}))

    def check(self, pipeline: Any, weights: str | None = None) -> None:
        """Compare the conditions with a pipeline: another kind of denoiser is refused, other differences are logged.

        `weights`: the denoiser's `fingerprint`, if it is known.

        Raises:
            ConfigurationError: the plan is for another class of denoiser.
        """
        here = conditions(pipeline, len(self.plan), weights)
        if here["denoiser"] != self.conditions.get("denoiser"):
            raise ConfigurationError(
                f"the plan was tuned for {self.conditions.get('denoiser')}, this pipeline has {here['denoiser']}"
            )
        for key, what in (("weights", "other weights"), ("scheduler", "another scheduler"), ("scheduler_config", "")):
            if here[key] != self.conditions.get(key):
                logger.warning(
                    "the plan was tuned with %s (%s, here %s): what it was measured to keep does not hold here",
                    what or "other settings of the scheduler",
                    self.conditions.get(key),
                    here[key],
                )
                return
