"""What both reuse features are on a pipeline."""

from __future__ import annotations

from typing import Any

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Attachment, Feature


class RunAttachment(Attachment):
    """Everything it holds lives for one call, in a run that `before_call` makes and installs."""

    def __init__(self, feature: Feature, pipeline: Any) -> None:
        super().__init__(feature, pipeline)
        self._run: Any = None
        self._counters: dict[str, float] = {}

    def begin(self) -> None:
        """Begin a call: the user may have replaced the denoiser since accelerate()."""
        reason = self.feature.supports(self.pipeline)
        if reason:
            raise ConfigurationError(f"{self.feature.name} cannot be used on this pipeline any more: {reason}")
        self._counters = {}

    def install(self, run: Any) -> None:
        """Put a run in force for this call."""
        self._run = run
        self.changes.add(run.uninstall)
        run.install()

    def after_call(self) -> None:
        super().after_call()
        self._run = None

    def counters(self) -> dict[str, float]:
        return dict(self._counters)
