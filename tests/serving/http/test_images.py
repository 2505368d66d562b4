"""Images over HTTP are those of the command line; OpenAI's own client understands every answer."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import numpy as np
import openai
import pytest
from http_server import SMALL, Server
from openai import OpenAI
from PIL import Image
from serving_tools import sticker

from diffusion_accel import LatentTransparency, Reuse
from diffusion_accel.generation.drawing import draw
from diffusion_accel.generation.request import Request


def opened(entry: Any) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(entry.b64_json)))


def near(a: Image.Image, b: Image.Image) -> bool:
    """Equal but for the rounding of a batch."""
    return a.mode == b.mode and bool(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 2)


def test_a_transparent_image_is_that_of_the_command_line(client: OpenAI) -> None:
    """Sizes, steps, guidance and scheduler are those that the model recommends."""
    found = client.images.generate(prompt="panda, 3d style", background="transparent", extra_body={"seed": 3})
    assert (found.background, found.output_format, found.size) == ("transparent", "png", "96x96")
    pipe = sticker(features=[LatentTransparency()], scheduler="dpm++")
    asked = Request(prompt="panda, 3d style", steps=20, guidance_scale=3.0, width=96, height=96, seed=3)
    assert near(opened(found.data[0]), draw(pipe, asked).images[0])


def test_everything_else_that_may_be_asked(client: OpenAI) -> None:
    more = {"negative_prompt": "blue", "num_inference_steps": 6, "guidance_scale": 2.0, "seed": 5, "scheduler": "euler"}
    found = client.images.generate(
        model="sticker",
        prompt="rocket, flat style",
        n=2,
        size="64x48",
        output_format="webp",
        output_compression=100,
        background="opaque",
        user="somebody",
        extra_body=more | {"reuse": "hold:2"},
    )
    assert [entry.seed for entry in found.data] == [5, 6] and found.plan == "hold:2"
    assert found.usage.steps == 6 and found.usage.skipped_steps == 3
    pipe = sticker(features=[Reuse(plan="hold:2")], scheduler="euler")
    options = {"negative_prompt": "blue", "steps": 6, "guidance_scale": 2.0, "width": 64, "height": 48}
    wanted = draw(pipe, Request(prompt="rocket, flat style", count=2, seed=5, **options)).images
    for entry, image in zip(found.data, wanted, strict=True):
        assert (made := opened(entry)).format == "WEBP" and made.size == (64, 48)
        assert np.abs(np.asarray(made, np.int16) - np.asarray(image, np.int16)).mean() < 4


@pytest.mark.parametrize(
    ("quality", "scheduler", "plan"),
    [("low", None, "fast"), ("medium", None, "balanced"), ("high", "ddim", "quality"), ("max", None, None)],
)
def test_quality_chooses_the_plan(client: OpenAI, quality: Any, scheduler: str | None, plan: str | None) -> None:
    found = client.images.generate(quality=quality, prompt="x", size="48x48", extra_body={"scheduler": scheduler})
    assert getattr(found, "plan", None) == plan and found.quality == quality
    assert bool(found.usage.skipped_steps) == (plan is not None)


def test_the_nearest_plan_that_is_so_fast(client: OpenAI) -> None:
    found = client.images.generate(prompt="x", size="48x48", extra_body={"speedup": 2})
    assert found.plan and found.usage.skipped_steps > 0


# ---------------------------------------------------------------------- what is refused
REFUSED = {
    "unknown field": ({"negativ_prompt": "x"}, 422, "negativ_prompt"),
    "no prompt": ({"prompt": None}, 422, "prompt"),
    "an empty prompt": ({"prompt": ""}, 422, "prompt"),
    "a prompt of blanks": ({"prompt": " \u3000\n"}, 422, "prompt"),
    "a number as text": ({"n": "1"}, 422, "n"),
    "true as a number": ({"n": True}, 422, "n"),
    "too many images": ({"n": 5}, 422, "n"),
    "too many steps": ({"num_inference_steps": 1001}, 422, "num_inference_steps"),
    "too large": ({"size": "256x256"}, 422, "size"),
    "no size": ({"size": "large"}, 422, "size"),
    "a size between": ({"size": "50x48"}, 400, "size"),
    "a long prompt": ({"prompt": "x" * 32_001}, 422, "prompt"),
    "a huge seed": ({"seed": 2**63}, 422, "seed"),
    "a seed near the end": ({"seed": 2**63 - 1, "n": 2}, 400, "seed"),
    "no such scheduler": ({"scheduler": "eular"}, 400, "scheduler"),
    "a scheduler's file": ({"scheduler": "/etc/passwd.json"}, 400, "scheduler"),
    "a plan's file": ({"reuse": "/etc/plan.json"}, 400, "reuse"),
    "a plan that is learned": ({"reuse": "auto"}, 400, "reuse"),
    "no such plan": ({"reuse": "tuned:other"}, 400, "reuse"),
    "two plans": ({"reuse": "hold:2", "quality": "low"}, 400, "quality"),
    "no plans for it": ({"scheduler": "euler", "quality": "low"}, 400, "quality"),
    "no plan is so fast": ({"speedup": 900}, 400, None),
    "transparent jpeg": ({"background": "transparent", "output_format": "jpeg"}, 400, "output_format"),
    "compressed png": ({"output_compression": 50}, 400, "output_compression"),
    "layers of one image": ({"layers": ["bg"]}, 400, "layers"),
    "not a number": ({"guidance_scale": float("nan")}, 422, "guidance_scale"),
    "addresses of images": ({"response_format": "url"}, 422, "response_format"),
    "another model": ({"model": "gpt-image-1"}, 404, "model"),
    "half a character": ({"prompt": "\ud800"}, 422, "prompt"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(server: Server, kind: str) -> None:
    changes, status, param = REFUSED[kind]
    found, _, body = server.ask("POST", "/v1/images/generations", SMALL | changes)
    error = body["error"]
    assert (found, error["param"]) == (status, param), error["message"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert "/etc" not in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"{", b"[" * 100_000, b"\xff", b"1" * 5000, b'"x"', b""], ids=lambda body: str(body[:3])
)
def test_no_json_object(server: Server, body: bytes) -> None:
    status, _, found = server.ask("POST", "/v1/images/generations", body, Content_Type="application/json")
    assert status in (400, 422) and found["error"]["message"]


def test_the_client_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="n must be at most 4"):
        client.images.generate(prompt="x", n=5)
    with pytest.raises(openai.NotFoundError, match="not served here; sticker is"):
        client.images.generate(prompt="x", model="dall-e-3")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").images.generate(prompt="x")


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["sticker"]
    assert client.models.retrieve("sticker").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../../etc/passwd")
