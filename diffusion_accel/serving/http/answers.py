"""Drawn images as bytes and JSON."""

from __future__ import annotations

import base64
import json
import time
from io import BytesIO
from typing import TYPE_CHECKING, Any

from diffusion_accel.generation.layers import by_image
from diffusion_accel.reuse.plan_family import called
from diffusion_accel.reuse.plan_file import TunedPlan
from diffusion_accel.reuse.reuse import Reuse

if TYPE_CHECKING:
    from PIL import Image

    from diffusion_accel.serving.handle import Served

    from .asked import Asked

FORMATS = ("png", "webp", "jpeg")
USUAL_COMPRESSION = 95  # of webp and jpeg


def encoded(image: Image.Image, asked: Asked) -> bytes:
    """An image in the format that was asked for."""
    options = {} if asked.output_format == "png" else {"quality": _quality(asked)}
    if asked.output_format == "jpeg":
        image = image.convert("RGB")
    file = BytesIO()
    image.save(file, asked.output_format.upper(), **options)
    return file.getvalue()


def _quality(asked: Asked) -> int:
    return USUAL_COMPRESSION if asked.compression is None else asked.compression


def whole(served: Served, asked: Asked) -> dict[str, Any]:
    """All of an answer."""
    return {**about(served.images, asked), "data": image_list(served.images, asked), "usage": usage(served)}


def image_list(images: list[Image.Image], asked: Asked) -> list[dict[str, Any]]:
    """For each seed its image, and beside it all layers that are wanted if there are several."""
    entries = []
    for layers, seed in zip(by_image(images, asked.layers), asked.request.seeds, strict=True):
        texts = {name: base64.b64encode(encoded(layers[name], asked)).decode() for name in asked.wanted}
        entry = {"b64_json": texts[asked.wanted[0]], "seed": seed}
        entries.append(entry | ({"layers": texts} if len(texts) > 1 else {}))
    return entries


def about(images: list[Image.Image], asked: Asked) -> dict[str, Any]:
    """What an answer says about its images."""
    image = images[0]
    plan = next((feature for feature in asked.features if isinstance(feature, Reuse)), None)
    words = {
        "created": int(time.time()),
        "background": "transparent" if "A" in image.mode else "opaque",
        "output_format": asked.output_format,
        "quality": asked.quality,
        "size": f"{image.width}x{image.height}",
    }
    return words | ({} if plan is None else {"plan": _name(plan)})


def usage(served: Served) -> dict[str, Any]:
    """What it took; tokens are not counted."""
    report = served.report
    return {
        "input_tokens": 0,
        "output_tokens": 0,
        "total_tokens": 0,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        "steps": report.steps,
        "skipped_steps": skipped_steps(served),
        "seconds": round(report.seconds, 4),
        "waited_seconds": round(served.waited, 4),
        "lora_step": served.lora_step,
    }


def skipped_steps(served: Served) -> int:
    """Steps that were not computed in full."""
    return int(sum(counters.get("reused_steps", 0) for counters in served.report.counters.values()))


def as_json(values: Any) -> bytes:
    """JSON as it is sent."""
    return json.dumps(values, ensure_ascii=True, separators=(",", ":")).encode()


def _name(plan: Reuse) -> str:
    source = plan.source
    return called(source) if isinstance(source, TunedPlan) else str(plan.plan)[:200]
