"""Images from images: forms with files, as OpenAI's client sends them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_server import TIMEOUT, TOKEN, Server
from openai import OpenAI
from PIL import Image

from diffusion_accel.generation.drawing import draw
from diffusion_accel.generation.loading import open_pipeline
from diffusion_accel.generation.request import Request

from .test_images import near, opened


def picture(size: tuple[int, int] = (48, 48), mode: str = "RGBA") -> Image.Image:
    samples = np.random.default_rng(3).integers(0, 256, (6, 6, len(mode)), np.uint8)
    return Image.fromarray(samples).resize(size)


def file(image: Image.Image, name: str = "image.png") -> tuple[str, bytes, str]:
    written = BytesIO()
    image.save(written, "PNG")
    return name, written.getvalue(), "image/png"


def hole(size: tuple[int, int] = (16, 16)) -> Image.Image:
    """A mask whose left half is transparent."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return mask


def test_an_image_with_alpha(client: OpenAI) -> None:
    more = {"strength": 0.5, "num_inference_steps": 6, "guidance_scale": 3.0, "seed": 4}
    found = client.images.edit(
        image=file(picture()), prompt="panda", size="48x48", background="transparent", extra_body=more
    )
    assert found.background == "transparent" and found.usage.steps == 3
    assert opened(found.data[0]).mode == "RGBA"  # tests/serving/test_tasks.py: the same as drawn alone


def test_where_the_mask_is_transparent(painter: Server, folder: Path) -> None:
    image = picture((16, 16), "RGB")
    more: dict[str, Any] = {"num_inference_steps": 3, "seed": 4}
    with OpenAI(base_url=f"{painter.url}/v1", api_key=TOKEN, timeout=TIMEOUT, max_retries=0) as client:
        found = client.images.edit(image=[file(image)], mask=file(hole()), prompt="red apple", extra_body=more)
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    pipe = open_pipeline(str(folder), device="cpu", task="inpainting")
    asked = Request(prompt="red apple", image=image, mask_image=mask, steps=3, seed=4)
    assert near(opened(found.data[0]), draw(pipe, asked).images[0])


REFUSED: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "no image": ({"files": {"mask": file(hole())}}, 422, "image"),
    "no image in it": ({"files": {"image": ("x.png", b"\x89PNG", "image/png")}}, 400, "image"),
    "two images": ({"files": [("image[]", file(picture())), ("image[]", file(picture()))]}, 400, "image"),
    "too many pixels": ({"files": {"image": file(picture((512, 512)))}}, 400, "image"),
    "another file": ({"files": {"image": file(picture()), "../../etc": file(picture())}}, 422, "../../etc"),
    "a mask of another size": ({"files": {"image": file(picture()), "mask": file(hole())}}, 400, "mask"),
    "a mask without a hole": ({"files": {"image": file(picture()), "mask": file(picture(mode="RGB"))}}, 400, "mask"),
    "a model that has no masks": ({"files": {"image": file(picture()), "mask": file(hole((48, 48)))}}, 400, None),
    "no number": ({"data": {"n": "many"}}, 422, "n"),
    "unknown field": ({"data": {"steps": "3"}}, 422, "steps"),
    "no step left": ({"data": {"strength": "0.01"}}, 400, "strength"),
    "an unknown LoRA": ({"data": {"lora[../x]": "1"}}, 400, None),
    "no form": ({"files": None, "json": {"prompt": "x"}}, 400, None),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(server: Server, kind: str) -> None:
    import requests

    changes, status, param = REFUSED[kind]
    given: dict[str, Any] = {"files": {"image": file(picture())}, **changes}
    given["data"] = None if "json" in given else {"prompt": "x", **given.get("data", {})}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    found = requests.post(f"{server.url}/v1/images/edits", headers=headers, timeout=TIMEOUT, **given)
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (status, param), error["message"]


def test_a_broken_form(server: Server) -> None:
    kind = "multipart/form-data; boundary=x"
    for body in (b"", b"--x\r\n", b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n", b"--y--"):
        assert server.ask("POST", "/v1/images/edits", body, Content_Type=kind)[0] in (400, 422)
