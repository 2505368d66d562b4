"""What a body means: the request that the engine is given, and how its images go back."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffusion_accel.denoisers import find_controlnet
from diffusion_accel.generation.layers import drawn_layers
from diffusion_accel.generation.request import Request
from diffusion_accel.image_files import LARGEST
from diffusion_accel.io import shown
from diffusion_accel.pipelines.learned import LEARNED
from diffusion_accel.pipelines.schedulers import SCHEDULERS, check_scheduler
from diffusion_accel.transparency.latent_transparency import LatentTransparency

from .plans import Plans
from .problems import Problem

if TYPE_CHECKING:
    from diffusion_accel.feature import Feature

    from .bodies import Drawing
    from .settings import ServerSettings

_STEPS_ONLY = ("reuse", "encoder_reuse")  # features of which a request may choose another
_CONTROL = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the engine is told, and what the answer is to be.

    Attributes:
        request: what is drawn.
        features: with what.
        scheduler: see `Engine.submit`.
        output_format: "png", "webp" or "jpeg".
        compression: quality of webp and jpeg, 0 to 100.
        layers: that one image is drawn as; ("",) without any.
        wanted: of them, those that go back, in order.
        background: "transparent" or "opaque": whether the images have alpha.
        quality: as it was asked for.
        loras, lora_deadline: see `Engine.submit`.
    """

    request: Request
    features: tuple[Feature, ...]
    scheduler: str | None = None
    output_format: str = "png"
    compression: int | None = None
    layers: tuple[str, ...] = ("",)
    wanted: tuple[str, ...] = ("",)
    background: str = "opaque"
    quality: str = "auto"
    loras: Mapping[str, float] = field(default_factory=dict)
    lora_deadline: int = 0


class Reader:
    """Reads bodies for one engine.

    Args:
        settings: of the server.
        pipe: the pipeline that is served.
        features: its own features, by name.
    """

    def __init__(self, settings: ServerSettings, pipe: Any, features: dict[str, Feature]) -> None:
        self.settings, self._features = settings, features
        self._controlled = find_controlnet(pipe) is not None
        self.plans = Plans(pipe, features.get("reuse"), settings.embedded)

    def read(self, body: Drawing, **images: Any) -> Asked:
        """What a body means.

        Args:
            body: as it came, its fields within the bounds that every server has.
            images: fields of `Request` that come from elsewhere.

        Raises:
            Problem: it is for another model, or beyond the limits of this server.
            ConfigurationError: it cannot be drawn.
        """
        settings = self.settings
        if body.model not in (None, settings.model):
            raise Problem(
                404,
                f"the model {shown(body.model)} is not served here; {settings.model} is",
                "model",
                "model_not_found",
            )
        self._check_limits(body)
        form = body.output_format or "png"
        background, features = self._background(body, form)
        features = self._steps(body, features)
        layers = drawn_layers(features)
        if body.layers is not None and not set(body.layers) <= set(layers):
            raise Problem(400, f"layers: {', '.join(filter(None, layers)) or 'none'} are drawn here", "layers")
        if form == "png" and body.output_compression is not None:
            raise Problem(400, "output_compression is for webp and jpeg; png is always exact", "output_compression")
        self._check_control(body, "control_image" in images)
        values = settings.defaults | {k: v for k, v in self._given(body).items() if v is not None} | images
        start = images.get("image", images.get("control_image"))
        own = (None, None) if start is None else start.size  # what is drawn where nothing says another size
        if start is not None and "control_image" in images and not values.get("width") and not values.get("height"):
            values |= {"width": start.width // 8 * 8 or 8, "height": start.height // 8 * 8 or 8}
        request = Request(prompt=body.prompt, seed=_seed(body.seed), count=body.n or 1, **values)
        self._check_size(request.width or own[0], request.height or own[1], form)
        return Asked(
            request=request,
            features=tuple(features.values()),
            scheduler=self._scheduler(body.scheduler),
            output_format=form,
            compression=body.output_compression,
            layers=layers,
            wanted=tuple(dict.fromkeys(body.layers)) if body.layers else layers,
            background=background,
            quality=body.quality or "auto",
            loras=body.lora or {},
            lora_deadline=body.lora_deadline or 0,
        )

    # ------------------------------------------------------------------ parts of it
    def _check_limits(self, body: Drawing) -> None:
        limits = self.settings.limits
        for name, value, most in (
            ("n", body.n, limits.images),
            ("num_inference_steps", body.num_inference_steps, limits.steps),
            ("prompt", len(body.prompt), limits.prompt),
            ("negative_prompt", len(body.negative_prompt or ""), limits.prompt),
        ):
            if value is not None and value > most:
                what = f"{name} must have" if "prompt" in name else f"{name} must be"
                raise Problem(
                    422, f"{what} at most {most}{' characters' * ('prompt' in name)}, got {value}", name, "over_limit"
                )

    def _check_control(self, body: Drawing, given: bool) -> None:
        if given and not self._controlled:
            raise Problem(400, "this server has no ControlNet; leave control_image out", "control_image")
        for name in _CONTROL:
            if getattr(body, name) is not None and not given:
                raise Problem(400, f"{name} is for requests with a control_image", name)

    def _check_size(self, width: int | None, height: int | None, form: str) -> None:
        limit = self.settings.limits.pixels
        if (width or 1) * (height or 1) > limit:
            raise Problem(
                422, f"size: {width}x{height} is more than the {limit} pixels that are allowed", "size", "over_limit"
            )
        largest = LARGEST.get(form.upper(), 1 << 30)
        if max(width or 0, height or 0) > largest:
            raise Problem(400, f"{form} holds at most {largest} pixels on a side; use png", "output_format")

    @staticmethod
    def _given(body: Drawing) -> dict[str, Any]:
        width, height = (None, None) if body.size in (None, "auto") else map(int, str(body.size).split("x"))
        return {
            "negative_prompt": body.negative_prompt,
            "steps": body.num_inference_steps,
            "guidance_scale": body.guidance_scale,
            **{name: getattr(body, name) for name in _CONTROL},
            "width": width,
            "height": height,
        }

    def _background(self, body: Drawing, form: str) -> tuple[str, dict[str, Feature]]:
        """Whether images have alpha, and the features that this takes."""
        features, own = dict(self._features), self._features.get("transparent")
        if body.background == "transparent" and form == "jpeg":
            raise Problem(400, "jpeg has no transparency; use png or webp", "output_format")
        if body.background == "opaque" or (body.background != "transparent" and (own is None or form == "jpeg")):
            features.pop("transparent", None)
            return "opaque", features
        return "transparent", features | {"transparent": own or LatentTransparency()}

    def _steps(self, body: Drawing, features: dict[str, Feature]) -> dict[str, Feature]:
        """The features with the plan that is asked for."""
        quality = None if body.quality == "auto" else body.quality
        if quality is None and body.reuse is None and body.speedup is None and body.min_psnr is None:
            return features
        others = {name: feature for name, feature in features.items() if name not in _STEPS_ONLY}
        reuse = self.plans.feature(quality, body.reuse, body.speedup, body.min_psnr, body.scheduler)
        return others if reuse is None else others | {"reuse": reuse}

    @staticmethod
    def _scheduler(name: str | None) -> str | None:
        """A scheduler by its short name or class, never a file."""
        if name is None or name == LEARNED:
            return name
        short = name.partition(",")[0]
        if short not in SCHEDULERS and not (short.endswith("Scheduler") and short.isidentifier()):
            allowed = ", ".join([*SCHEDULERS, LEARNED])
            raise Problem(
                400, f"unknown scheduler {shown(name)}; allowed: {allowed}, or a diffusers class", "scheduler"
            )
        check_scheduler(name)
        return name


def _seed(seed: int | None) -> int:
    return secrets.randbelow(2**32) if seed is None else seed
