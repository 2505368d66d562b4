"""Which features a request is drawn with, attached once for all requests that have the same."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from diffusion_accel.feature import Feature
from diffusion_accel.switchboard import accelerate, share_features

_KEPT = 16  # sets of features


class FeatureSets:
    """Accelerated pipelines, one for each set of features that requests have.

    A feature that acts on calls of models (held steps, branches of guidance, transparent images) is attached once;
    requests get copies of it that share what it has loaded. One that works inside of a denoiser is attached to each
    request's own twin.

    Args:
        pattern: makes a plain pipeline of twins, to attach features to.
    """

    def __init__(self, pattern: Any) -> None:
        self._pattern = pattern
        self._made: list[tuple[tuple[Feature, ...], Any]] = []
        self._lock = threading.Lock()

    def pipeline(self, features: Sequence[Feature]) -> Any:
        """The pipeline with these features; it is asked and copied, never called.

        Raises:
            ConfigurationError, UnsupportedPipelineError, FeatureConflictError: they cannot be used.
        """
        wanted = tuple(features)
        with self._lock:
            for place, (known, made) in enumerate(self._made):
                if known == wanted:
                    self._made.append(self._made.pop(place))
                    return made
            made = accelerate(self._pattern(), *wanted)
            self._made.append((wanted, made))
            del self._made[:-_KEPT]
            return made

    def inside(self, features: Sequence[Feature]) -> tuple[str, ...]:
        """The names of those that work inside of the denoiser."""
        pipe = self.pipeline(features)
        return tuple(name for name, one in pipe.acceleration.features.items() if one.works_inside(pipe))

    def accelerated(self, pipe: Any, features: Sequence[Feature], inside: Sequence[str]) -> Any:
        """A plain pipeline with features of which these work inside of its denoiser."""
        return accelerate(pipe, *features) if inside else share_features(self.pipeline(features), pipe)
