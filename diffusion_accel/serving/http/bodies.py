"""The fields of bodies and answers, with all bounds that do not depend on how the server is set up."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from diffusion_accel.generation.request import LIMITS, MAX_SEED
from diffusion_accel.serving.adapters import SCALES

from .problems import Detail

MOST_LORAS = 8  # of a request
SCALE = LIMITS["controlnet_conditioning_scale"]

Size = Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description='"WIDTHxHEIGHT" or auto.')]
Name = Annotated[str, Field(min_length=1, max_length=200)]
LoraName = Annotated[str, Field(min_length=1, max_length=100)]
LoraScale = Annotated[float, Field(ge=SCALES[0], le=SCALES[1], allow_inf_nan=False)]


def _said(prompt: str) -> str:
    if not prompt.strip():
        raise PydanticCustomError("blank", "the prompt is empty; say what to draw")
    return prompt


Prompt = Annotated[
    str,
    Field(
        min_length=1,
        description="What is drawn, more than blanks; for a model of classes, a class.",
        json_schema_extra={"pattern": r"\S"},
    ),
    AfterValidator(_said),
]


class Drawing(BaseModel):
    """What generations, edits and jobs have in common. What is null or missing is up to the server and its model."""

    model_config = ConfigDict(extra="forbid")

    prompt: Prompt
    model: Annotated[Name | None, Field(description="The model that is served, as /v1/models names it.")] = None
    n: Annotated[int | None, Field(ge=1, le=100, description="Images; image k has the seed + k.")] = None
    size: Size | None = None
    background: Annotated[
        Literal["auto", "transparent", "opaque"] | None, Field(description="transparent: with alpha; png or webp.")
    ] = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description="Quality of webp and jpeg; png is always exact.")
    ] = None
    quality: Annotated[
        Literal["auto", "low", "medium", "high", "max"] | None,
        Field(description="Which tuned plan: fast, balanced, quality; max: every step is computed."),
    ] = None
    response_format: Annotated[Literal["b64_json"] | None, Field(description="Images come in the answer.")] = None
    user: Annotated[str | None, Field(max_length=256, description="Is not used.")] = None
    negative_prompt: str | None = None
    num_inference_steps: Annotated[int | None, Field(ge=1, le=10_000)] = None
    guidance_scale: Annotated[float | None, Field(ge=0, le=1000, allow_inf_nan=False)] = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED)] = None
    scheduler: Annotated[
        Name | None, Field(description="A short name (ddim, dpm++, euler, …) or a diffusers class.")
    ] = None
    reuse: Annotated[
        str | None, Field(min_length=1, max_length=2000, description="A plan by name, or its steps; never a file.")
    ] = None
    speedup: Annotated[float | None, Field(ge=1, le=1000, description="The nearest tuned plan that is so fast.")] = None
    min_psnr: Annotated[float | None, Field(ge=5, le=80, description="The fastest tuned plan that is so near, dB.")] = (
        None
    )
    lora: Annotated[
        dict[LoraName, LoraScale] | None,
        Field(max_length=MOST_LORAS, description="Scales of LoRAs that the server knows by name."),
    ] = None
    lora_deadline: Annotated[
        int | None,
        Field(ge=0, le=10_000, description="The step at which LoRAs that are not in memory are waited for; 0: before."),
    ] = None
    control_image: Annotated[
        str | None, Field(min_length=1, description="For the server's ControlNet, as base64; in forms a file.")
    ] = None
    controlnet_conditioning_scale: Annotated[
        float | None,
        Field(ge=SCALE.low, le=SCALE.high, allow_inf_nan=False, description="How much the ControlNet counts."),
    ] = None
    control_guidance_start: Annotated[
        float | None, Field(ge=0, le=1, allow_inf_nan=False, description="The share of the steps before it counts.")
    ] = None
    control_guidance_end: Annotated[
        float | None, Field(ge=0, le=1, allow_inf_nan=False, description="The share of the steps after which it ends.")
    ] = None
    layers: Annotated[
        list[Literal["fg", "bg", "blend"]] | None,
        Field(min_length=1, max_length=3, description="Of a model that draws layers, those that are wanted."),
    ] = None


class JobBody(Drawing):
    """The body of /jobs."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Streamed(Drawing):
    """How answers come."""

    stream: Annotated[bool | None, Field(description="Server-sent events, the images as the last of them.")] = None
    partial_images: Annotated[
        int | None, Field(ge=0, le=3, description="With stream: how often they are shown before they are finished.")
    ] = None


class Generation(Streamed):
    """The body of /v1/images/generations."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Edit(Streamed):
    """The fields of /v1/images/edits beside its files."""

    strength: Annotated[
        float | None, Field(gt=0, le=1, description="How much of the image is replaced; null: the pipeline's own.")
    ] = None


class ImageData(BaseModel):
    """One image."""

    b64_json: str
    seed: int
    layers: dict[str, str] | None = None


class Usage(BaseModel):
    """What it took. Tokens are not counted."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_details: dict[str, int] = {"image_tokens": 0, "text_tokens": 0}
    steps: int | None = None
    skipped_steps: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0
    lora_step: int | None = None


class Images(BaseModel):
    """What was drawn."""

    created: int
    background: str
    output_format: str
    quality: str
    size: str
    data: list[ImageData]
    usage: Usage
    plan: str | None = None


class Job(BaseModel):
    """How far a job is."""

    id: str
    status: Literal["queued", "generating", "completed", "failed", "cancelled"]
    created: int
    queue_position: int
    progress: float
    step: int
    steps: int
    poll_url: str
    cancel_url: str
    result: Images | None = None
    error: Detail | None = None


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "diffusion-accel"


class Models(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """How the server is."""

    status: str
    details: dict[str, Any] | None = None
