"""The error types. Every error this toolkit raises on purpose derives from `AccelerationError`.

A message says what was given, what is allowed and what to do, in one line. It names fields and arguments; the command
line puts its flags in their place, and has the table of exit codes (cli/errors.py).
"""

from __future__ import annotations


class AccelerationError(Exception):
    """Base class.

    Attributes:
        consequence: of the failure of another process of the job, whose own message says more.
    """

    consequence = False


class ConfigurationError(AccelerationError, ValueError):
    """A feature, setting or flag has a value that is not allowed."""


class UnsupportedPipelineError(AccelerationError, TypeError):
    """A feature cannot work on this pipeline, model or scheduler. Nothing has been changed."""


class FeatureConflictError(AccelerationError):
    """Two features cannot be combined. Nothing has been changed."""


class CallStateError(AccelerationError, RuntimeError):
    """The denoiser is used in a way the running call cannot follow (shared by two calls, changed mid-call)."""


class OutputError(AccelerationError, OSError):
    """An output cannot be written (it exists, or its folder is not writable)."""


class ModelLoadError(AccelerationError):
    """A model, adapter or checkpoint cannot be loaded."""


class DamagedStateError(ConfigurationError):
    """What an interrupted run left, to go on from, is damaged."""


class QueueFullError(AccelerationError):
    """A request is refused because as many wait as may; it may be made again later."""


class EngineClosedError(CallStateError):
    """A request is refused, or ended, because what serves requests is being closed."""
