"""The one list of features. CLI flags, `AcceleratedPipeline` keywords, docs and checks are generated from it.

To add a feature: write its `Feature` class in a package of its own and add one line here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .arguments import nearest
from .errors import ConfigurationError

if TYPE_CHECKING:
    from .feature import Feature

# name -> "module:class"; a string, so that listing features imports none of them
FEATURES: dict[str, str] = {
    "patch_parallel": "diffusion_accel.parallel.patch_parallel:PatchParallel",
    "task_routing": "diffusion_accel.routing.task_routing:TaskRouting",
    "reuse": "diffusion_accel.reuse.reuse:Reuse",
    "encoder_reuse": "diffusion_accel.reuse.encoder_reuse:EncoderReuse",
    "controlnet_parallel": "diffusion_accel.controlnet.controlnet_parallel:ControlNetParallel",
    "compiled": "diffusion_accel.compiled.compiled:Compiled",
    "transparent": "diffusion_accel.transparency.latent_transparency:LatentTransparency",
}


def feature_class(name: str) -> type[Feature]:
    """The feature class called `name` (underscores or dashes). Raises `ConfigurationError` for an unknown name."""
    key = name.replace("-", "_")
    if key not in FEATURES:
        near = nearest(key, FEATURES)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ConfigurationError(f"unknown feature {name!r}; the features are: {', '.join(sorted(FEATURES))}{hint}")
    module, cls = FEATURES[key].split(":")
    return getattr(importlib.import_module(module), cls)


def all_features() -> list[type[Feature]]:
    """Every registered feature class, in the order in which features attach."""
    return sorted((feature_class(name) for name in FEATURES), key=lambda cls: (cls.order, cls.name))
