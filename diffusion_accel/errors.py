"""The error types. Every error this toolkit raises on purpose derives from `AccelerationError`.

A message says what was given, what is allowed and what to do; the CLI prints it as one line.
"""

from __future__ import annotations


class AccelerationError(Exception):
    """Base class.

    Attributes:
        exit_code: what the CLI ends with: 2 for a usage error, 1 for a failure.
        consequence: of the failure of another process of the job, whose own message says more.
    """

    exit_code = 1
    consequence = False


class ConfigurationError(AccelerationError, ValueError):
    """A feature, setting or flag has a value that is not allowed."""

    exit_code = 2


class UnsupportedPipelineError(AccelerationError, TypeError):
    """A feature cannot work on this pipeline, model or scheduler. Nothing has been changed."""

    exit_code = 2


class FeatureConflictError(AccelerationError):
    """Two features cannot be combined. Nothing has been changed."""

    exit_code = 2


class CallStateError(AccelerationError, RuntimeError):
    """The denoiser is used in a way the running call cannot follow (shared by two calls, changed mid-call)."""


class OutputError(AccelerationError, OSError):
    """An output cannot be written (it exists, or its folder is not writable)."""


class ModelLoadError(AccelerationError):
    """A model, adapter or checkpoint cannot be loaded."""
