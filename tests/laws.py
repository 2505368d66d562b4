"""What tests of features share: settings for models with random weights, ways to stop a call, what it left behind."""

from __future__ import annotations

from typing import Any

import torch
from transparency_weights import tiny_weights
from zoo import controlnet, sd

# What a feature needs before it attaches to a model with random weights, beside the recommended settings.
NEEDED: dict[str, dict[str, Any]] = {
    "task_routing": {"untrained": True},
    "transparent": {"weights": tiny_weights()},
    "compiled": {"engine": "eager"},  # the laws of real engines: tests/compiled
}

# Features that only say when something is computed: with others they are tried by tests of their own.
APART = ("controlnet_parallel",)


def traces(pipe: Any) -> list[str]:
    """Everything a feature could have left behind on the modules and the scheduler."""
    left = []
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            for path, module in component.named_modules():
                left += [f"{name}.{path}: {key}" for key in ("_diffusers_hook", "forward") if key in module.__dict__]
    return left + [f"scheduler: {k}" for k in ("step", "set_timesteps") if k in pipe.scheduler.__dict__]


def default(feature: Any) -> Any:
    return feature(**NEEDED.get(feature.name, {}))


def kind_for(feature: Any) -> Any:
    """What builds a pipeline that a feature is for."""
    return controlnet if feature.name in APART else sd


def built(features: Any) -> tuple[Any, dict[str, Any]]:
    """A plain pipeline that all these features support, and a call of it; with a ControlNet if need be."""
    pipe, call = sd()
    return (pipe, call) if all(default(f).supports(pipe) is None for f in features) else controlnet()


class Stop(Exception):
    pass


def stop_at(step: int, error: type[BaseException]) -> Any:
    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            raise error
        return values

    return callback
