"""Which features a request is drawn with, attached once for all requests that have the same."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffusion_accel.denoisers import denoiser_names
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Feature
from diffusion_accel.switchboard import accelerate, put_inside, share_features

from .twins import Twins, base_class

_KEPT = 16  # sets of features


@dataclass(frozen=True)
class FeatureSet:
    """Features that requests have in common, and how their calls are computed.

    Attributes:
        features: as they were asked for.
        pipe: a pipeline with them; it is asked and copied, never called.
        alone: the names of those for which a request's denoiser runs alone, in its own thread.
        models: denoisers, by their names in the pipeline, in the place of the shared ones: those features are in force
            inside of them that treat each row by itself.
    """

    features: tuple[Feature, ...]
    pipe: Any
    alone: tuple[str, ...] = ()
    models: Mapping[str, nn.Module] = field(default_factory=dict)

    def accelerated(self, pipe: Any) -> Any:
        """A plain pipeline of twins with these features."""
        return accelerate(pipe, *self.features) if self.alone else share_features(self.pipe, pipe)


class FeatureSets:
    """The sets of features that requests had last.

    Three ways. A feature that acts on calls (held steps, branches of guidance, alpha) is attached once; requests get
    copies that share what it has loaded. One that treats each row inside of a denoiser by itself (an adapter of latent
    transparency, task routing) is put into a twin of the denoiser, once, and all requests that have it share that. Any
    other that works inside is attached to the request's own twin, which runs alone.
    """

    def __init__(self) -> None:
        self._made: list[tuple[Any, FeatureSet]] = []  # with what was asked for
        self._lock = threading.Lock()

    def of(self, pattern: Any, features: Sequence[Feature], alone: bool = False) -> FeatureSet:
        """The set of these features.

        Args:
            pattern: a plain pipeline with the models that twins are made of.
            features: which.
            alone: whatever works inside of a denoiser does so alone.

        Raises:
            ConfigurationError, UnsupportedPipelineError, FeatureConflictError: they cannot be used.
        """
        if refused := [feature.name for feature in features if not feature.served]:
            raise ConfigurationError(
                f"{', '.join(refused)} is not for an engine, which orders all computing; leave it out"
            )
        wanted = (tuple(features), alone, base_class(pattern))
        with self._lock:
            known = next((one for one in self._made if one[0] == wanted), None)
            if known is not None:
                self._made.remove(known)
            self._made.append(known or (wanted, self._make(pattern, wanted[0], alone)))
            del self._made[:-_KEPT]
            return self._made[-1][1]

    @staticmethod
    def _make(pattern: Any, features: tuple[Feature, ...], alone: bool) -> FeatureSet:
        parts = Twins(pattern)
        pipe = accelerate(parts.pipeline(getattr(pattern, "scheduler", None)), *features)
        inside = {name: one for name, one in pipe.acceleration.features.items() if one.works_inside(pipe)}
        if inside and (alone or not all(feature.rows_apart(pipe) for feature in inside.values())):
            return FeatureSet(features, pipe, alone=tuple(inside))
        put_inside(pipe)
        return FeatureSet(features, pipe, models={n: parts.parts[n] for n in denoiser_names(pipe)} if inside else {})
