"""What the fields of the page hold, and the body of a request that it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from diffusion_accel.generation.request import MAX_SEED
from diffusion_accel.io import shown
from diffusion_accel.serving.http.bodies import JobBody
from diffusion_accel.serving.http.problems import Problem


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What is entered, in the order of the page. None or empty: nothing, the server and its model decide.

    Attributes:
        prompt: what is drawn.
        negative_prompt: what is not.
        position: of the slider, see `Choices`.
        transparent: with alpha.
        compare: draw every step, too.
        seed: a whole number as text, since a browser rounds those above 2^53.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        scheduler: a short name.
        width, height: pixels.
        image: where the drawing starts, as base64; a drawn image's fields have none.
        strength: how much of it is replaced, above 0 to 1.
        loras: scales of LoRAs by name.
        previews: show the image while it is drawn.
    """

    prompt: str = ""
    negative_prompt: str = ""
    position: int = 0
    transparent: bool = False
    compare: bool = False
    seed: str = ""
    steps: float | None = None
    guidance_scale: float | None = None
    scheduler: str = ""
    width: float | None = None
    height: float | None = None
    image: str = ""
    strength: float | None = None
    loras: Mapping[str, float] = field(default_factory=dict)
    previews: bool = True

    def body(self, plan: dict[str, Any]) -> JobBody:
        """The body of a request.

        Args:
            plan: the fields of it that choose a plan.

        Raises:
            Problem, RequestValidationError: a field is out of its limits.
        """
        if not self.prompt.strip():
            raise Problem(422, "enter a prompt first", "prompt")
        if (self.width is None) != (self.height is None):
            raise Problem(422, "give width and height, or neither", "size")
        size = None if self.width is None else f"{_whole(self.width, 'width')}x{_whole(self.height, 'height')}"
        values = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt or None,
            "size": size,
            "background": "transparent" if self.transparent else "opaque",
            "num_inference_steps": _whole(self.steps, "steps"),
            "guidance_scale": self.guidance_scale,
            "seed": _seed(self.seed),
            "scheduler": self.scheduler or None,
            "lora": dict(self.loras) or None,
            **plan,
        }
        try:
            return JobBody.model_validate(values)
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error


def _whole(value: float | None, name: str) -> int | None:
    if value is None or value == int(value):
        return None if value is None else int(value)
    raise Problem(422, f"{name} must be a whole number, got {shown(value)}", name)


def is_seed(text: str) -> bool:
    """Whether a text is a seed."""
    return text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= MAX_SEED


def _seed(text: str) -> int | None:
    text = text.strip()
    if not text:
        return None
    if not is_seed(text):
        raise Problem(422, f"seed must be a whole number of 0 to {MAX_SEED}, or empty, got {shown(text)}", "seed")
    return int(text)
