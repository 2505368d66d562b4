"""Clients of AUTOMATIC1111's web UI work, here webuiapi."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import webuiapi
from http_server import SMALL, TOKEN, Server
from PIL import Image
from serving_tools import sticker

from diffusion_accel.generation.drawing import draw
from diffusion_accel.generation.request import Request
from diffusion_accel.image_metadata import parse_parameters

from .test_edits import picture
from .test_images import near

TINY: dict[str, Any] = {"width": 48, "height": 48, "steps": 3, "seed": 7}


@pytest.fixture
def api(server: Server) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(port=server.port, username="anybody", password=TOKEN)


def test_from_a_prompt(api: webuiapi.WebUIApi) -> None:
    found = api.txt2img(prompt="panda", negative_prompt="blue", cfg_scale=3.0, batch_size=2, **TINY)
    asked = {"negative_prompt": "blue", "guidance_scale": 3.0, "steps": 3, "width": 48, "height": 48, "seed": 7}
    wanted = draw(sticker(scheduler="euler-a"), Request(prompt="panda", count=2, **asked)).images
    assert all(near(one, other) for one, other in zip(found.images, wanted, strict=True))
    assert found.info["all_seeds"] == [7, 8] and found.parameters["steps"] == 3
    prompt, negative, values = parse_parameters(found.info["infotexts"][1])
    assert (prompt, negative, values["Seed"], values["Sampler"]) == ("panda", "blue", "8", "Euler a")


@pytest.mark.parametrize("prompt", ["", " "])
def test_an_empty_prompt_is_one_for_these_clients(prompt: str, api: webuiapi.WebUIApi) -> None:
    found = api.txt2img(prompt=prompt, cfg_scale=3.0, **TINY)
    asked = {"guidance_scale": 3.0, "steps": 3, "width": 48, "height": 48, "seed": 7}
    assert near(found.image, draw(sticker(scheduler="euler-a"), Request(prompt="", **asked)).images[0])
    assert found.info["prompt"] == prompt


def test_from_an_image(api: webuiapi.WebUIApi) -> None:
    found = api.img2img(images=[picture(mode="RGB")], prompt="panda", denoising_strength=0.5, cfg_scale=3.0, **TINY)
    pipe = sticker(scheduler="euler-a", task="image-to-image")
    asked = {"image": picture(mode="RGB"), "strength": 0.5, "guidance_scale": 3.0, "steps": 3, "seed": 7}
    assert near(found.image, draw(pipe, Request(prompt="panda", width=48, height=48, **asked)).images[0])


def test_what_there_is(api: webuiapi.WebUIApi) -> None:
    assert api.util_get_model_names() == ["sticker"] and api.util_get_current_model() == "sticker"
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= set(api.util_get_sampler_names())
    api.set_options({"sd_model_checkpoint": "sticker"})
    assert api.get_progress()["state"]["job_count"] == 0


def test_progress_and_interrupt(api: webuiapi.WebUIApi, server: Server) -> None:
    ended: list[Any] = []
    asked = SMALL | {"width": 48, "height": 48, "steps": 1000}
    thread = threading.Thread(target=lambda: ended.append(server.ask("POST", "/sdapi/v1/txt2img", asked)))
    thread.start()
    server.until("requests", 1, state="running")
    while not api.get_progress()["state"]["sampling_step"]:
        assert thread.is_alive()
    found = api.get_progress()
    assert 0 < found["progress"] < 1 and found["state"]["sampling_steps"] == 1000
    api.interrupt()
    thread.join()
    status, _, body = ended[0]
    assert status == 409 and body["error"]["code"] == "cancelled"


@pytest.mark.parametrize(
    ("changes", "status", "word"),
    [
        ({"enable_hr": True}, 422, "enable_hr"),
        ({"alwayson_scripts": {"x": {"args": []}}}, 422, "alwayson_scripts"),
        ({"script_name": "x"}, 422, "script_name"),
        ({"override_settings": {"sd_model_checkpoint": "other"}}, 404, "sd_model_checkpoint"),
        ({"override_settings": {"outdir_samples": "/tmp"}}, 422, "outdir_samples"),
        ({"sampler_name": "Restart"}, 404, "sampler_name"),
        ({"scheduler": "sgm_uniform"}, 422, "scheduler"),
        ({"width": 4096, "height": 4096}, 422, "size"),
        ({"batch_size": 3, "n_iter": 3}, 422, "n"),
        ({"prompt": "panda <lora:../../etc/passwd:1>"}, 400, None),
        ({"seed": -2}, 422, "seed"),
        ({"cfg_scale": False}, 422, "cfg_scale"),
    ],
)
def test_refused(server: Server, changes: dict[str, Any], status: int, word: str | None) -> None:
    found, _, body = server.ask("POST", "/sdapi/v1/txt2img", {"prompt": "x", **TINY, **changes})
    assert (found, body["error"]["param"]) == (status, word), body


def test_images_are_never_addresses(server: Server) -> None:
    for text in ("http://127.0.0.1/x.png", "file:///etc/passwd", "/etc/passwd", "data:image/png;base64,AAAA"):
        body = {"prompt": "x", "init_images": [text], **TINY}
        assert server.ask("POST", "/sdapi/v1/img2img", body)[0] == 400
    assert server.ask("POST", "/sdapi/v1/options", [1])[0] == 400


def test_spacings_of_samplers(server: Server) -> None:
    """Both ways in which clients name them mean the same."""
    both = ({"sampler_name": "DPM++ 2M Karras"}, {"sampler_name": "DPM++ 2M", "scheduler": "Karras"})
    first, second, other = (
        server.ask("POST", "/sdapi/v1/txt2img", {"prompt": "x", **TINY, **more})[2]["images"]
        for more in (*both, {"sampler_name": "DPM++ 2M"})
    )
    assert first == second != other


def test_a_mask(server: Server) -> None:
    mask = webuiapi.b64_img(Image.new("L", (48, 48), 255))
    body = {"prompt": "x", "init_images": [webuiapi.b64_img(picture())], "mask": mask, **TINY}
    status, _, found = server.ask("POST", "/sdapi/v1/img2img", body)
    assert status == 400 and "cannot do inpainting" in found["error"]["message"]  # not this model; test_edits.py
