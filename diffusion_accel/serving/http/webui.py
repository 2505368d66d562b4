"""An adapter for clients of AUTOMATIC1111's web UI: its names for what this server can do.

What a picture depends on and this server cannot do is refused. Left aside are: how an image is fitted (`resize_mode`:
it is resized), what is under a mask at first (`inpainting_fill`: the image), drawing the masked part alone in full size
(`inpaint_full_res`), and settings of single samplers.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from PIL import Image, ImageFilter, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffusion_accel import __version__
from diffusion_accel.generation.request import MAX_SEED
from diffusion_accel.image_metadata import parameters_text
from diffusion_accel.io import shown
from diffusion_accel.pipelines.schedulers import SCHEDULERS

from .answers import as_json, image_list
from .bodies import Drawing
from .problems import ERRORS, Problem
from .uploads import LARGER, decoded, from_base64
from .webui_controlnet import Unit, unit_of

if TYPE_CHECKING:
    from diffusion_accel.serving.handle import Handle, Served

    from .asked import Asked
    from .service import Service

#: a sampler's name there -> the scheduler's here
SAMPLERS = {
    "Euler a": "euler-a",
    "Euler": "euler",
    "DPM++ 2M": "dpm++",
    "DPM++ 2M SDE": "dpm++-sde",
    "Heun": "heun",
    "LMS": "lms",
    "DPM2": "kdpm2",
    "DPM2 a": "kdpm2-a",
    "DDIM": "ddim",
    "DDPM": "ddpm",
    "DEIS": "deis",
    "PLMS": "pndm",
    "UniPC": "unipc",
    "LCM": "lcm",
}
_SPACINGS = ("karras", "exponential", "beta")  # of noise levels, behind a sampler's name or as `scheduler`
_LORA = re.compile(r"<lora:([^:<>]{1,100})(?::(-?\d{1,3}(?:\.\d{1,6})?))?>")
# what would change the picture and is not here -> the values that ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "enable_hr": (False, None),
    "restore_faces": (False, None),
    "tiling": (False, None),
    "subseed_strength": (0, None),
    "seed_resize_from_w": (0, -1, None),
    "seed_resize_from_h": (0, -1, None),
    "styles": ([], None),
    "script_name": ("", None),
    "refiner_checkpoint": ("", None),
}
_Text = Annotated[str, Field(max_length=1_000_000)]
_MODEL_OPTION = "sd_model_checkpoint"


class _Drawing(Drawing):
    """What the other routes read, from clients for which an empty prompt is one: the web UI draws without."""

    prompt: _Text = ""


class TextToImage(BaseModel):
    """The fields that are read; others are left aside, or refused where they would change the picture."""

    model_config = ConfigDict(extra="allow", strict=True)

    prompt: _Text = ""
    negative_prompt: _Text = ""
    seed: Annotated[int | None, Field(ge=-1, le=MAX_SEED)] = None
    batch_size: Annotated[int | None, Field(ge=1, le=100)] = None
    n_iter: Annotated[int | None, Field(ge=1, le=100)] = None
    steps: Annotated[int | None, Field(ge=1, le=10_000)] = None
    cfg_scale: Annotated[float | None, Field(ge=0, le=1000, allow_inf_nan=False)] = None
    width: Annotated[int | None, Field(ge=8, le=32_768)] = None
    height: Annotated[int | None, Field(ge=8, le=32_768)] = None
    sampler_name: Annotated[str | None, Field(max_length=100)] = None
    sampler_index: Annotated[str | None, Field(max_length=100)] = None
    scheduler: Annotated[str | None, Field(max_length=100)] = None
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None


class ImageToImage(TextToImage):
    """The same with an image, and a mask."""

    init_images: Annotated[list[str], Field(min_length=1, max_length=1)]
    mask: str | None = None
    mask_blur: Annotated[float | None, Field(ge=0, le=64)] = None
    inpainting_mask_invert: Annotated[int | None, Field(ge=0, le=1)] = None
    denoising_strength: Annotated[float, Field(gt=0, le=1)] = 0.75


def routes(service: Service) -> APIRouter:
    """The routes, for one server."""
    router = APIRouter(prefix="/sdapi/v1", tags=["web UI"], responses=ERRORS)
    settings = service.settings
    running: dict[int, Handle] = {}

    @router.post("/txt2img")
    async def txt2img(body: TextToImage, http: Request) -> Response:
        """Draw images from a prompt."""
        return await drawn(body, http, {})

    @router.post("/img2img")
    async def img2img(body: ImageToImage, http: Request) -> Response:
        """Draw images from an image, or where a mask is white."""
        images = await asyncio.to_thread(_images, body, settings.limits.pixels * LARGER)
        return await drawn(body, http, images | {"strength": body.denoising_strength})

    async def drawn(body: TextToImage, http: Request, images: dict[str, Any]) -> Response:
        unit = unit_of(body.alwayson_scripts, service)
        if unit is not None:
            images |= await asyncio.to_thread(_control, unit, images, settings.limits.pixels * LARGER)
        asked = service.reader.read(_drawing(body, settings.model, unit), **images)
        handle = await service.submit(asked)
        running[id(handle)] = handle
        try:
            served = await service.finished(handle, http)
        finally:
            del running[id(handle)]
        http.state.log = {"images": len(served.images), "steps": served.report.steps, "rows": round(served.rows, 2)}
        content = await service.in_thread(_answer, served, asked, body)
        return Response(content, media_type="application/json")

    @router.get("/progress")
    async def progress() -> dict[str, Any]:
        """How far the oldest of these requests is."""
        first = next(iter(running.values()), None)
        standing = first.progress if first is not None else None
        done, total = (standing.step, standing.steps) if standing else (0, 0)
        state = {
            "skipped": False,
            "interrupted": False,
            "job": "txt2img" if first is not None else "",
            "job_count": len(running),
            "job_no": 0,
            "sampling_step": done,
            "sampling_steps": total,
        }
        share = min(0.99, done / total) if total else 0.0
        left = service.metrics.mean_seconds * (1 - share) if first is not None else 0.0
        texts = {"current_image": None, "textinfo": None}
        return {"progress": round(share, 4), "eta_relative": round(left, 2), "state": state, **texts}

    @router.post("/interrupt")
    async def interrupt() -> dict[str, Any]:
        """End all requests that came this way."""
        for handle in list(running.values()):
            handle.cancel()
        return {}

    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """The samplers, by the names that they have there."""
        return [{"name": name, "aliases": [here], "options": {}} for name, here in SAMPLERS.items()]

    @router.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        """The model that is served."""
        name = settings.model
        return [{"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}]

    @router.get("/options")
    async def options() -> dict[str, Any]:
        """What is set."""
        return {_MODEL_OPTION: settings.model, "samples_format": "png"}

    @router.post("/options")
    async def set_options(http: Request) -> dict[str, Any]:
        """Nothing can be set; the model that is served may be named."""
        _check_options(await _object(http), settings.model)
        return {}

    return router


# ---------------------------------------------------------------------- what is asked
async def _object(http: Request) -> dict[str, Any]:
    try:
        values = await http.json()
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise Problem(400, "the body is not a JSON object")
    return values


def _check_options(options: dict[str, Any], model: str) -> None:
    for name, value in options.items():
        if name != _MODEL_OPTION:
            raise Problem(422, f"{shown(name)} cannot be set here", name[:100], "not_supported")
        if value != model:
            raise Problem(404, f"the model {shown(value)} is not served here; {model} is", name, "model_not_found")


def _drawing(body: TextToImage, model: str, unit: Unit | None = None) -> Drawing:
    """A body of the web UI in the words of the other routes."""
    for name, neutral in _NEUTRAL.items():
        value = (body.model_extra or {}).get(name)
        if value not in neutral:
            raise Problem(422, f"{name} is not there on this server, got {shown(value)}", name, "not_supported")
    _check_options(body.override_settings or {}, model)
    if (body.width is None) != (body.height is None):
        raise Problem(422, "give width and height, or neither", "width")
    prompt, loras = _loras(body.prompt)
    values = {
        "prompt": prompt,
        "size": None if body.width is None else f"{body.width}x{body.height}",
        "negative_prompt": body.negative_prompt or None,
        "n": (body.batch_size or 1) * (body.n_iter or 1),
        "num_inference_steps": body.steps,
        "guidance_scale": body.cfg_scale,
        "seed": None if body.seed == -1 else body.seed,
        "scheduler": _scheduler(body.sampler_name or body.sampler_index, body.scheduler),
        "lora": loras or None,
        **({} if unit is None else unit.fields()),
    }
    try:
        return _Drawing.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _loras(prompt: str) -> tuple[str, dict[str, float]]:
    """A prompt without <lora:NAME:SCALE>, and these."""
    found = {name: float(scale or 1.0) for name, scale in _LORA.findall(prompt)}
    return _LORA.sub("", prompt).strip() if found else prompt, found


def _scheduler(sampler: str | None, spacing: str | None) -> str | None:
    """The scheduler of a sampler, with the spacing behind its name or beside it."""
    usual = (None, "", "automatic")
    if sampler in (*usual, "Automatic") and (spacing or "").lower() in usual:
        return None
    if sampler is None:
        raise Problem(422, "scheduler needs a sampler_name", "scheduler")
    name, behind = sampler, ""
    for word in _SPACINGS:
        if sampler.lower().endswith(f" {word}"):
            name, behind = sampler[: -len(word) - 1], word
    if spacing is not None and spacing.lower() not in usual:
        behind = spacing.lower()
    known = {there.lower(): here for there, here in SAMPLERS.items()} | {here: here for here in SCHEDULERS}
    here = known.get(name.lower())
    if here is None:
        raise Problem(
            404, f"no sampler {shown(sampler)}; there are: {', '.join(SAMPLERS)}", "sampler_name", "not_found"
        )
    if behind and behind not in _SPACINGS:
        allowed = ", ".join(("automatic", *_SPACINGS))
        raise Problem(
            422, f"scheduler {shown(spacing)} is not there; there are: {allowed}", "scheduler", "not_supported"
        )
    return f"{here},{behind}" if behind else here


def _images(body: ImageToImage, limit: int) -> dict[str, Image.Image]:
    image = decoded(from_base64(body.init_images[0], "init_images"), "image", limit)
    if body.mask is None:
        return {"image": image}
    mask = ImageOps.grayscale(decoded(from_base64(body.mask, "mask"), "mask", limit))
    if body.inpainting_mask_invert:
        mask = ImageOps.invert(mask)
    if body.mask_blur:
        mask = mask.filter(ImageFilter.GaussianBlur(body.mask_blur))
    if mask.size != image.size:
        mask = mask.resize(image.size)
    return {"image": image, "mask_image": mask}


def _control(unit: Unit, images: dict[str, Any], limit: int) -> dict[str, Image.Image]:
    """The image for the ControlNet: the unit's, or the one that the drawing starts from."""
    name = "control_image"
    if unit.picture is not None:
        return {name: decoded(from_base64(unit.picture, name), name, limit)}
    if "image" not in images:
        raise Problem(422, "alwayson_scripts.controlnet: image is missing", "alwayson_scripts.controlnet")
    return {name: images["image"]}


# ---------------------------------------------------------------------- what goes back
def _answer(served: Served, asked: Asked, body: TextToImage) -> bytes:
    request, size = asked.request, served.images[0].size
    pairs = {
        "Steps": served.report.steps,
        "Sampler": body.sampler_name,
        "CFG scale": request.guidance_scale,
        "Size": f"{size[0]}x{size[1]}",
        "Version": f"diffusion-accel {__version__}",
    }
    texts = [parameters_text(request.prompt, request.negative_prompt, pairs | {"Seed": seed}) for seed in request.seeds]
    entries = image_list(served.images, asked)
    info = {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * request.count,
        "negative_prompt": request.negative_prompt or "",
        "seed": request.seed,
        "all_seeds": request.seeds,
        "width": size[0],
        "height": size[1],
        "sampler_name": body.sampler_name,
        "cfg_scale": request.guidance_scale,
        "steps": served.report.steps,
        "batch_size": request.count,
        "infotexts": texts,
    }
    images = [text for entry in entries for text in (entry.get("layers") or {"": entry["b64_json"]}).values()]
    echoed = body.model_dump(exclude={"init_images", "mask", "alwayson_scripts"}, exclude_unset=True)
    known = {name: value for name, value in echoed.items() if name in type(body).model_fields}
    return as_json({"images": images, "parameters": known, "info": json.dumps(info)})
