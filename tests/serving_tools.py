"""What the tests of serving share: the embedded model, requests, and the same drawn alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from diffusion_accel import accelerate
from diffusion_accel.generation.drawing import prepare
from diffusion_accel.generation.loading import open_pipeline
from diffusion_accel.generation.request import Request
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.serving.collector import Ticket
from diffusion_accel.serving.engine import Engine

LATENTS = {"output_type": "latent"}
FOREVER = 1e9  # milliseconds: a batch waits for every request that runs
TIMEOUT = 60  # seconds after which a test has failed


def sticker(**options: Any) -> Any:
    pipe = open_pipeline("sticker", device="cpu", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def request(seed: int, **changes: Any) -> Request:
    given = {"prompt": "red apple, 3d style", "steps": 3, "guidance_scale": 3.0, "width": 48, "height": 48}
    return Request(seed=seed, **(given | changes))


def alone(pipe: Any, asked: Request, features: Sequence[Any] = (), scheduler: str | None = None, **others: Any) -> Any:
    """What the pipeline draws by itself, with these features and no others; drawn once."""
    key = (id(pipe), repr((asked, features, scheduler, others)))
    if key not in _drawn:
        _drawn[key] = pipe, _alone(pipe, asked, features, scheduler, others)
    return _drawn[key][1]


_drawn: dict[Any, tuple[Any, Any]] = {}  # with the pipeline, whose id is another's once it is gone


def _alone(pipe: Any, asked: Request, features: Sequence[Any], scheduler: str | None, others: dict[str, Any]) -> Any:
    before, switched = pipe.scheduler, dict(pipe.acceleration.features)
    pipe.acceleration.remove()
    try:
        if scheduler is not None:
            set_scheduler(pipe, scheduler)
        return prepare(accelerate(pipe, *features), asked).images(**(LATENTS | others))
    finally:
        pipe.scheduler = before
        pipe.acceleration.remove()
        accelerate(pipe, *switched.values())


@contextmanager
def held(engine: Engine, count: int) -> Iterator[None]:
    """What is submitted within begins together: nothing is computed until so many requests ask for something."""
    collector, ticket = engine._collector, Ticket()
    with collector.turn(ticket, "a test"):
        yield
        until_parked(engine, count)


def until_parked(engine: Engine, count: int) -> None:
    """Wait until so many requests ask for something to be computed."""
    collector = engine._collector
    with collector._changed:
        assert collector._changed.wait_for(lambda: len(collector._waiting) >= count, TIMEOUT)


def same(found: Any, wanted: Any) -> None:
    """Latents of one image drawn in batches and alone: the difference is rounding."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-4


def served(engine: Engine, asked: Sequence[tuple[Request, dict[str, Any]]], **others: Any) -> list[Any]:
    """Requests with what `submit` is told beside them, which run at the same time."""
    with held(engine, len(asked)):
        handles = [engine.submit(one, arguments=LATENTS, **more, **others) for one, more in asked]
    return [handle.result(TIMEOUT) for handle in handles]


def sharing(engine: Engine) -> set[str]:
    """The parts whose calls were computed together with those of other requests."""
    stats = engine.stats()
    return {part for part, rows in stats["batches"].items() if stats["calls"][part] > sum(rows.values())}


def mean_rows(engine: Engine, part: str = "unet") -> float:
    batches = engine.stats()["batches"][part]
    return sum(rows * count for rows, count in batches.items()) / sum(batches.values())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
