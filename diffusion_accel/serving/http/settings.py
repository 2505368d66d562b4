"""How a server is set up, and what it lets requests ask for."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.generation.request import LIMITS, Bounds, at_least

#: what each limit of `Limits` may be set to
BOUNDS: dict[str, Bounds] = {
    "pixels": at_least(64, 2**30),
    "steps": LIMITS["steps"],
    "images": at_least(1, 100),
    "body_mb": at_least(1, 1024),
    "prompt": at_least(1, 1_000_000),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for at most.

    Attributes:
        pixels: of an image.
        steps: denoising steps.
        images: of a request.
        body_mb: MiB of a request's body, uploaded images included.
        prompt: characters.

    Raises:
        ConfigurationError: one of them is out of its `BOUNDS`.
    """

    pixels: int = 2048 * 2048
    steps: int = 150
    images: int = 10
    body_mb: int = 64
    prompt: int = 32_000

    def __post_init__(self) -> None:
        for one in fields(self):
            if (value := getattr(self, one.name)) not in (bounds := BOUNDS[one.name]):
                raise ConfigurationError(f"{one.name} must be {bounds.allowed(value)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What a server says about itself, and does where a request says nothing.

    Attributes:
        model: the name that requests may give.
        embedded: whether it is an embedded model, for which tuned plans ship.
        defaults: fields of `Request` by name (steps, guidance_scale, width, height, negative_prompt).
        limits: see `Limits`.
        token: what clients have to send; None: nothing.
        lora_folder: where LoRAs are; None: there are none.
        lora_changes: whether clients may change which of them there are.
        page: whether there is a page for browsers at /.
        hosts: names by which clients may call it, without ports; None: any.
        started: when, in seconds since 1970.
    """

    model: str
    embedded: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    token: str | None = field(default=None, repr=False)
    lora_folder: Path | None = None
    lora_changes: bool = False
    page: bool = True
    hosts: frozenset[str] | None = None
    started: int = field(default_factory=lambda: int(time.time()))
