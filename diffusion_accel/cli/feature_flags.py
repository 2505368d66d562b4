"""The feature flags, generated from the registry."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Feature
from diffusion_accel.pipelines.accelerated import make_feature
from diffusion_accel.registry import FEATURES, all_features, feature_class

_VALUE = re.compile(r"on$|off$|[A-Za-z_]\w*=")


def join_bare_flags(arguments: list[str]) -> list[str]:
    """Let `--feature` stand alone: a following token is its value only if it is on, off, begins with `key=`, or is a
    text that the feature takes without a key."""
    flags = {"--" + name.replace("_", "-") for name in FEATURES}
    joined: list[str] = []
    rest = iter(arguments)
    waiting = None  # a feature flag whose value may follow
    for token in rest:
        if waiting is not None:
            taken = _VALUE.match(token) or feature_class(waiting.removeprefix("--")).accepts_bare(token)
            value = token if taken else "on"
            joined.append(f"{waiting}={value}")
            waiting = None
            if value is token:
                continue
        if token == "--":
            return [*joined, token, *rest]
        if token in flags:
            waiting = token
        else:
            joined.append(token)
    return [*joined, f"{waiting}=on"] if waiting is not None else joined


def with_feature_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command`, which takes `**features`, one option for each registered feature."""
    signature = inspect.signature(command, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for feature in all_features():
        option = typer.Option(
            feature.flag(),
            metavar="[KEY=VALUE,…|off]",
            help=f"{feature.summary[0].upper()}{feature.summary[1:]}.",
            rich_help_panel="Features",
            show_default="off",
        )
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(feature.name, kind, default=None, annotation=Annotated[str | None, option]))
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def parse_feature(name: str, value: Any) -> Feature | None:
    """A feature from a flag's text or a configuration file's value; None if it is switched off."""
    if value in (None, False, "off"):
        return None
    if not isinstance(value, (bool, dict, str)):
        flag = feature_class(name).flag()
        raise ConfigurationError(f"{flag}: expected true, false, a table of keys or key=value text, got {value!r}")
    try:
        return make_feature(name, True if value == "on" else value)
    except ConfigurationError as error:
        problem = str(error).removeprefix(f"{name}: ")
        if problem == str(error):
            raise
        raise ConfigurationError(f"{feature_class(name).flag()}: {problem}") from error
