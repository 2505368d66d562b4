"""Images while they are drawn: events as OpenAI's client reads them."""

from __future__ import annotations

import base64
from io import BytesIO

import openai
import pytest
from http_server import SMALL, Server, post
from openai import OpenAI
from PIL import Image

DRAW = "/v1/images/generations"


def test_partial_images_with_alpha(client: OpenAI) -> None:
    asked = {"prompt": "panda, 3d style", "size": "48x48", "background": "transparent", "partial_images": 2}
    more = {"num_inference_steps": 6, "seed": 1}
    events = list(client.images.generate(stream=True, extra_body=more, **asked))
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1] and events[-1].usage.steps == 6
    images = [Image.open(BytesIO(base64.b64decode(event.b64_json))) for event in events]
    assert all(image.mode == "RGBA" and image.size == (48, 48) for image in images)
    whole = client.images.generate(**{k: v for k, v in asked.items() if k != "partial_images"}, extra_body=more)
    assert whole.data[0].b64_json == events[-1].b64_json  # looking changes nothing
    assert len({event.b64_json for event in events}) == 3


def test_refused_before_the_first_event(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="unknown scheduler"):
        client.images.generate(prompt="x", stream=True, extra_body={"scheduler": "eular"})
    with pytest.raises(openai.BadRequestError, match="stream: true"):
        client.images.generate(prompt="x", partial_images=1)


def test_several_images_without_partial_ones(server: Server) -> None:
    status, headers, body = server.ask("POST", DRAW, SMALL | {"n": 2, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert body.count(b"event: image_generation.completed\n") == 2 and b'"seed":8' in body


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["queued", "running"])
def test_a_client_that_goes_away(server: Server, stream: bool, when: str) -> None:
    """Its request ends where it is; others go on."""
    gone = server.metric("requests_ended_total", outcome="cancelled")
    busy = [server.raw(post(DRAW, SMALL | {"num_inference_steps": 1000})) for _ in range(4)] if when == "queued" else []
    if busy:
        server.until("requests", 4, state="running")
    leaving = server.raw(post(DRAW, SMALL | {"num_inference_steps": 1000, "stream": stream}))
    server.until("requests", 1, state=when)
    leaving.close()
    server.until("requests_ended_total", gone + 1, outcome="cancelled")
    for one in busy:
        one.close()
    server.until("requests_ended_total", gone + 1 + len(busy), outcome="cancelled")
    assert server.ask("POST", DRAW, SMALL)[0] == 200


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 1.0])
def test_a_client_that_goes_away_while_it_speaks(server: Server, part: float) -> None:
    text = post(DRAW, SMALL)
    server.raw(text[: int(part * len(text))]).close()
    assert server.ask("POST", DRAW, SMALL)[0] == 200


def test_a_client_that_reads_nothing(server: Server) -> None:
    """It keeps nobody waiting."""
    with server.raw(post(DRAW, SMALL | {"stream": True, "partial_images": 3})):
        done = server.metric("requests_ended_total", outcome="completed")
        assert server.ask("POST", DRAW, SMALL)[0] == 200
        server.until("requests_ended_total", done + 1, outcome="completed")


def test_a_full_queue(server: Server) -> None:
    """Four run and four wait; the next one is told when to come again, and nothing that was accepted is lost."""
    gone = server.metric("requests_ended_total", outcome="cancelled")
    waiting = [server.raw(post(DRAW, SMALL | {"num_inference_steps": 1000})) for _ in range(6)]
    server.until("requests", 2, state="queued")
    waiting += [server.raw(post(DRAW, SMALL)) for _ in range(2)]
    server.until("requests", 4, state="queued")
    status, headers, body = server.ask("POST", DRAW, SMALL)
    assert status == 429 and int(headers["retry-after"]) >= 1
    assert body["error"]["type"] == "rate_limit_error" and "4 requests wait already" in body["error"]["message"]
    for one in waiting[:6]:
        one.close()
    server.until("requests_ended_total", gone + 6, outcome="cancelled")
    for one in waiting[6:]:
        assert b" 200 OK" in one.recv(100)
        one.close()
