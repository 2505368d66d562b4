"""A ControlNet behind HTTP: the image for it comes as base64 or as a file, and is bounded as every other."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import requests
from http_server import TIMEOUT, TOKEN, Server
from PIL import Image

from diffusion_accel.generation.drawing import draw
from diffusion_accel.generation.loading import open_pipeline
from diffusion_accel.generation.request import Request

from .test_edits import file, picture
from .test_images import near

ASKED: dict[str, Any] = {"prompt": "red apple", "seed": 4}
CONTROL = picture((32, 24), "RGB")  # drawn at 16x16, as the server was started


def as_text(image: Image.Image) -> str:
    return base64.b64encode(file(image)[1]).decode()


def images(body: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(BytesIO(base64.b64decode(entry["b64_json"]))) for entry in body["data"]]


def ask(server: Server, **more: Any) -> tuple[int, Any]:
    status, _, body = server.ask("POST", "/v1/images/generations", ASKED | more)
    return status, body


def form(server: Server, path: str, files: dict[str, Any], **fields: Any) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    data = {key: str(value) for key, value in (ASKED | fields).items()}
    found = requests.post(f"{server.url}{path}", headers=headers, timeout=TIMEOUT, files=files, data=data)
    return found.status_code, found.json()


def test_the_images_are_those_drawn_alone(painter: Server, folder: Path, controlnet: Path) -> None:
    common: dict[str, Any] = {"prompt": "red apple", "seed": 4, "width": 16, "height": 16}
    control = {"control_image": CONTROL, "controlnet_conditioning_scale": 2.0}
    given = {"control_image": as_text(CONTROL), "controlnet_conditioning_scale": 2.0}
    status, body = ask(painter, **given)
    assert status == 200, body
    (found,) = images(body)
    pipe = open_pipeline(str(folder), device="cpu", controlnet=str(controlnet))
    assert near(found, draw(pipe, Request(steps=2, **common, **control)).images[0])
    (bare,) = images(ask(painter)[1])
    assert near(bare, draw(open_pipeline(str(folder), device="cpu"), Request(steps=2, **common)).images[0])
    assert not near(bare, found)
    web = {**given, "control_image": "data:image/png;base64," + given["control_image"]}
    assert near(images(ask(painter, **web)[1])[0], found)

    status, job = form(painter, "/jobs/edits", {"image": file(picture()), "control_image": file(CONTROL)}, strength=1)
    assert status == 202, job
    files = {"image": file(picture()), "control_image": file(CONTROL)}
    status, body = form(painter, "/v1/images/edits", files, strength=1, controlnet_conditioning_scale=2)
    assert status == 200, body
    pipe = open_pipeline(str(folder), device="cpu", controlnet=str(controlnet), task="image-to-image")
    wanted = Request(steps=2, image=picture(), strength=1.0, **common, **control)
    assert near(images(body)[0], draw(pipe, wanted).images[0])


def test_limits(server: Server, painter: Server) -> None:
    """An image that is sent may have four times as many pixels as one that is drawn."""
    large = as_text(picture((72, 64), "RGB"))
    for given, status in ((large, 400), (as_text(picture((64, 64), "RGB")), 200)):
        assert ask(painter, control_image=given)[0] == status
    status, body = ask(server, control_image=as_text(CONTROL))
    assert status == 400 and "no ControlNet" in body["error"]["message"]


REFUSED: dict[str, tuple[dict[str, Any], int]] = {
    "no base64": ({"control_image": "!"}, 400),
    "an address": ({"control_image": "http://127.0.0.1/x.png"}, 400),
    "a path": ({"control_image": "/etc/passwd"}, 400),
    "no image in it": ({"control_image": "iVBORw=="}, 400),
    "empty": ({"control_image": ""}, 422),
    "no text": ({"control_image": 3}, 422),
    "a scale alone": ({"controlnet_conditioning_scale": 1.0}, 400),
    "a scale too large": ({"control_image": as_text(CONTROL), "controlnet_conditioning_scale": 11}, 422),
    "a scale below 0": ({"control_image": as_text(CONTROL), "controlnet_conditioning_scale": -1}, 422),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(painter: Server, kind: str) -> None:
    more, wanted = REFUSED[kind]
    for path in ("/v1/images/generations", "/jobs"):
        status, _, body = painter.ask("POST", path, ASKED | more)
        assert status == wanted, body
        assert "\n" not in body["error"]["message"] and "control" in str(body["error"]["param"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"ip_adapter_image": "x"}, "ip_adapter_image: this server draws without IP-Adapters; leave it out"),
        ({"ip_adapter": "x", "control_image": "x"}, "ip_adapter: this server draws without IP-Adapters; leave it out"),
        ({"control_image": ["x", "y"]}, "control_image: one is taken, for the one ControlNet of this server, got a l"),
        ({"controlnet_conditioning_scale": [1, 0.5]}, "controlnet_conditioning_scale: one is taken, for the one Contr"),
        ({"control_guidance_end": [1]}, "control_guidance_end: one is taken, for the one ControlNet"),
        ({"control_images": ["x"]}, "control_images: one control_image is read, for the one ControlNet"),
        (
            {"controlnet": ["a", "b"]},
            "controlnet: the ControlNet is the one that the server was started with; leave it ",
        ),
        ({"clip_skip": 2}, "clip_skip: there is no such field; /docs lists those that there are"),
    ],
)
def test_what_is_not_on_a_server(painter: Server, more: dict[str, Any], words: str) -> None:
    for path in ("/v1/images/generations", "/jobs"):
        status, _, body = painter.ask("POST", path, ASKED | more)
        assert status == 422 and words in body["error"]["message"]
        assert body["error"]["param"] == next(iter(more))
    if all(isinstance(value, str) for value in more.values()):
        status, body = form(painter, "/v1/images/edits", {"image": file(picture())}, **more)
        assert status == 422 and words in body["error"]["message"]


def test_an_image_for_an_ip_adapter(painter: Server) -> None:
    files = {"image": file(picture()), "ip_adapter_image": file(CONTROL)}
    status, body = form(painter, "/v1/images/edits", files)
    assert status == 422 and "this server draws without IP-Adapters; leave it out" in body["error"]["message"]


def test_one_is_read(painter: Server) -> None:
    files = {"image": file(picture()), "control_image": file(CONTROL)}
    status, body = form(painter, "/v1/images/edits", files, control_image=as_text(CONTROL))
    assert status == 400 and "one control_image is read" in body["error"]["message"]
