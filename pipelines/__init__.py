"""Wrapper pipelines: the mixin, the factory `AcceleratedPipeline` and named drop-ins."""

from .mixin import AcceleratedMixin

__all__ = ["AcceleratedMixin"]
