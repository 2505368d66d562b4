"""Learned solvers as a family of plans keeps them: a configuration for each number of evaluations, and its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

OWN = (  # of a configuration; the rest is for other schedulers, and comes from the pipeline's
    "_class_name",
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "flow",
)


def is_family(values: object) -> bool:
    """Whether a JSON value is a family of plans, which may have solvers."""
    return isinstance(values, dict) and "members" in values and "solvers" in values


def apart(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each solver of a configuration for itself.

    Args:
        config: of a learned scheduler, as its file has it.

    Returns:
        By number of evaluations {"config": the configuration with this solver only, "measured": its numbers, with how
        many evaluations they are of and what was wanted}.
    """
    kept = {key: config[key] for key in OWN if key in config}
    made_for = dict(config.get("made_for") or {})
    measured = made_for.pop("measured", None)
    numbers = measured if isinstance(measured, dict) else {}
    numbers = {number: own for number, own in numbers.items() if isinstance(own, dict)}
    notes = {key: made_for[key] for key in ("towards", "reference") if key in made_for}
    return {
        number: {
            "config": {**kept, "solvers": {number: solver}, "made_for": made_for},
            "measured": {"evaluations": int(number), **notes, **numbers.get(number, {})},
        }
        for number, solver in (config.get("solvers") or {}).items()
    }


def together(solvers: object, where: str) -> dict[str, Any]:
    """The inverse of `apart`: one configuration with all solvers.

    Args:
        solvers: of a family's file, by name.
        where: the file; errors begin with it.

    Raises:
        ConfigurationError: there are none, or they are not for the same model.
    """
    entries = list(solvers.values()) if isinstance(solvers, dict) else []
    if not entries:
        raise ConfigurationError(f"{where} is a family of plans without solvers; tune makes some with evaluations")
    whole: dict[str, Any] = {}
    found: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    for entry in entries:
        config = entry.get("config") if isinstance(entry, dict) else None
        if not isinstance(config, dict) or not isinstance(config.get("solvers"), dict):
            raise ConfigurationError(f"{where}: a solver's config must have solvers, got {shown(config)}")
        if whole and {**config, "solvers": None} != {**whole, "solvers": None}:
            raise ConfigurationError(f"{where}: its solvers are for different models or calls")
        if twice := found.keys() & config["solvers"].keys():
            raise ConfigurationError(f"{where}: two solvers are for {shown(min(twice))} evaluations")
        whole = config
        found |= config["solvers"]
        measured |= dict.fromkeys(config["solvers"], entry.get("measured"))
    made_for = whole.get("made_for")
    record = {**made_for, "measured": measured} if isinstance(made_for, dict) else made_for
    return {**whole, "solvers": found, "made_for": record}
