"""Graphs before the first request: calls of every size and batch that are to be expected."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.measure.request import whole

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MADE = ("graphs_compiled", "graphs_loaded", "compile_seconds")


def warm_up(
    pipe: DiffusionPipeline, batches: Sequence[int] = (1,), sizes: Sequence[tuple[int, int]] = (), **call: Any
) -> dict[str, float]:
    """Compile, or load from disk, what calls of these batches and sizes need, so that none of them waits for it later.

        warm_up(pipe, batches=(1, 4), sizes=[(512, 512), (768, 512)], prompt="", num_inference_steps=20)

    Each combination is drawn once. A plan's kinds of steps are graphs of their own, so give the steps, the guidance and
    the kind of prompt that requests will have.

    Args:
        pipe: an accelerated pipeline with `Compiled`.
        batches: images of a call (`num_images_per_prompt`), each at least 1.
        sizes: (height, width) in pixels; none: what `call` says, or the pipeline's own.
        call: the other arguments of the pipeline's call.

    Returns:
        "graphs_compiled", "graphs_loaded" and "compile_seconds", of all calls together.

    Raises:
        ConfigurationError: the pipeline is not compiled, or a batch is not allowed.
    """
    acceleration: Any = getattr(pipe, "acceleration", None)
    if acceleration is None or "compiled" not in acceleration.features:
        raise ConfigurationError("warm_up takes a pipeline that is compiled: accelerate(pipe, Compiled()) first")
    for batch in batches:
        whole("batches", batch)
    made = dict.fromkeys(MADE, 0.0)
    shapes: list[dict[str, int]] = [{"height": height, "width": width} for height, width in sizes] or [{}]
    for batch, shape in itertools.product(batches, shapes):
        pipe(**{**call, **shape, "num_images_per_prompt": batch})  # type: ignore[operator]
        counted = acceleration.report().counters["compiled"]
        made = {name: made[name] + counted.get(name, 0) for name in MADE}
    return made
