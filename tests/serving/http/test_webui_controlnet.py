"""ControlNet units of clients of AUTOMATIC1111's web UI, here webuiapi."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import webuiapi
from http_server import TOKEN, Server

from diffusion_accel.generation.drawing import draw
from diffusion_accel.generation.loading import open_pipeline
from diffusion_accel.generation.request import Request

from .test_controlnet import CONTROL, as_text
from .test_edits import picture
from .test_images import near

TINY: dict[str, Any] = {"width": 16, "height": 16, "steps": 4, "seed": 4, "cfg_scale": 3.0, "sampler_name": "DDIM"}
SAME: dict[str, Any] = {"prompt": "red apple", "width": 16, "height": 16, "steps": 4, "seed": 4, "guidance_scale": 3.0}


@pytest.fixture
def api(painter: Server) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(port=painter.port, username="anybody", password=TOKEN)


def units(**changes: Any) -> dict[str, Any]:
    """One unit. The client would put it into the default of its argument, for all calls that come after."""
    unit = webuiapi.ControlNetUnit(**({"image": CONTROL, "weight": 2.0} | changes))
    return {"controlnet_units": [unit], "alwayson_scripts": {}}


def test_the_images_are_those_drawn_alone(api: webuiapi.WebUIApi, folder: Path, controlnet: Path) -> None:
    """Also with a start and an end of control, and from an image, which is the unit's where that has none."""
    opened = {"device": "cpu", "controlnet": str(controlnet), "scheduler": "ddim"}
    pipe = open_pipeline(str(folder), **opened)
    wanted = {"control_image": CONTROL, "controlnet_conditioning_scale": 2.0}
    for given in ({}, {"guidance_start": 0.25, "guidance_end": 0.6}):
        found = api.txt2img(prompt="red apple", **units(**given), **TINY)
        named = {f"control_{name}": value for name, value in given.items()}
        assert near(found.image, draw(pipe, Request(**SAME, **wanted, **named)).images[0])
    assert not near(found.image, draw(pipe, Request(**SAME, **wanted)).images[0])

    start = {"images": [picture(mode="RGB")], "denoising_strength": 0.5, "prompt": "red apple", **TINY}
    pipe = open_pipeline(str(folder), **opened, task="image-to-image")
    for given, control in ({}, CONTROL), ({"image": None}, picture(mode="RGB")):
        found = api.img2img(**units(**given), **start)
        asked = Request(**SAME, **(wanted | {"control_image": control}), image=picture(mode="RGB"), strength=0.5)
        assert near(found.image, draw(pipe, asked).images[0])


def test_units_that_ask_for_nothing(api: webuiapi.WebUIApi, painter: Server) -> None:
    bare = api.txt2img(prompt="red apple", alwayson_scripts={}, **TINY).image
    off = api.txt2img(prompt="red apple", **units(enabled=False), **TINY).image
    assert off.tobytes() == bare.tobytes()
    body = {"prompt": "red apple", "alwayson_scripts": {"controlnet": {"args": []}}, **TINY}
    assert painter.ask("POST", "/sdapi/v1/txt2img", body)[0] == 200


def test_names_of_the_image(painter: Server) -> None:
    """Clients of several ages send it under several names; what comes back holds no image but the drawn one."""
    answers = []
    for image in ({"input_image": as_text(CONTROL)}, {"image": {"image": as_text(CONTROL), "mask": None}}):
        body = {"prompt": "x", "alwayson_scripts": {"ControlNet": {"args": [image]}}, **TINY}
        status, _, found = painter.ask("POST", "/sdapi/v1/txt2img", body)
        assert status == 200 and "alwayson_scripts" not in found["parameters"]
        answers.append(found["images"])
    assert answers[0] == answers[1]


def test_what_there_is(api: webuiapi.WebUIApi, painter: Server, server: Server, controlnet: Path) -> None:
    (name,) = api.controlnet_model_list()
    assert name == controlnet.name and api.controlnet_module_list() == ["none"] and api.controlnet_version() == 2
    assert api.txt2img(prompt="x", **units(model=name), **TINY).image.size == (16, 16)
    assert server.ask("GET", "/controlnet/model_list")[2] == {"model_list": []}
    assert painter.ask("GET", "/controlnet/model_list", Authorization="")[0] == 401


REFUSED: dict[str, tuple[Any, int, str]] = {
    "a preprocessor": ({"module": "canny"}, 422, "module 'canny'"),
    "another model": ({"model": "other"}, 404, "no model 'other'"),
    "a mode": ({"control_mode": "My prompt is more important"}, 422, "control_mode"),
    "a mask": ({"mask": "x"}, 422, "mask"),
    "a mask in the image": ({"image": {"image": "x", "mask": "y"}}, 422, "mask"),
    "no image": ({"image": ""}, 422, "image is missing"),
    "an address": ({"image": "http://127.0.0.1/x.png"}, 400, "base64"),
    "a path": ({"image": "/etc/passwd"}, 400, "base64"),
    "a number": ({"image": {"image": 3}}, 422, "base64"),
    "a weight too large": ({"weight": 11}, 422, "weight"),
    "no number": ({"weight": "1"}, 422, "weight"),
    "an end before its start": ({"guidance_start": 0.5, "guidance_end": 0.5}, 400, "must be below"),
    "an end beyond": ({"guidance_end": 1.5}, 422, "guidance_end"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(painter: Server, kind: str) -> None:
    changes, status, words = REFUSED[kind]
    given = {"image": as_text(CONTROL)} | changes
    body = {"prompt": "x", "alwayson_scripts": {"controlnet": {"args": [given]}}, **TINY}
    found, _, answer = painter.ask("POST", "/sdapi/v1/txt2img", body)
    assert found == status and words in answer["error"]["message"], answer
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize("args", [[{}, {}], {"0": {}}, None, [3], ["x"]])
def test_refused_units(painter: Server, server: Server, args: Any) -> None:
    body = {"prompt": "x", "alwayson_scripts": {"controlnet": {"args": args}}, **TINY}
    assert painter.ask("POST", "/sdapi/v1/txt2img", body)[0] == 422
    body["alwayson_scripts"]["controlnet"]["args"] = [{"image": as_text(CONTROL)}]
    status, _, answer = server.ask("POST", "/sdapi/v1/txt2img", body | {"width": 48, "height": 48})
    assert status == 422 and "no ControlNet" in answer["error"]["message"]
