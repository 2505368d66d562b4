"""The page at /: what it answers, what it refuses, and what its buttons do, over a real server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import html
import json
import math
import uuid
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any
from unittest import mock

import pytest
import requests
from http_server import TIMEOUT, TOKEN, Server, running
from PIL import Image
from starlette.routing import Match

from diffusion_accel.image_metadata import read_embedded
from diffusion_accel.reuse.plan_family import down, load_shipped
from diffusion_accel.serving.http.page import route

from .test_controlnet import as_text
from .test_edits import picture

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'diffusion-accel[ui]'")
apply_diff = pytest.importorskip("gradio_client.utils").apply_diff

BASIC = "Basic " + base64.b64encode(f"anybody:{TOKEN}".encode()).decode()  # as a browser sends it
FIELDS = {
    "prompt": "panda, 3d style",
    "negative": "",
    "position": 4,
    "transparent": False,
    "compare": False,
    "seed": "7",
    "steps": 4,
    "guidance": 3,
    "scheduler": "",
    "width": 48,
    "height": 48,
    "image": "",
    "strength": 0.6,
    "loras": "[]",
    "previews": False,
}


@pytest.fixture(scope="module")
def functions(shared_server: Server) -> dict[str, dict[str, Any]]:
    """What the page may call, by name."""
    status, _, found = shared_server.ask("GET", "/config")
    assert status == 200
    return {one["api_name"]: one for one in found["dependencies"]}


def call(server: Server, functions: dict[str, Any], name: str, data: list[Any], **more: Any) -> list[Any]:
    """What a function of the page gives, as a browser asks for it: what changed of each of its outputs."""
    asked = {"data": data, "fn_index": functions[name]["id"], "session_hash": uuid.uuid4().hex, **more}
    status, _, answer = server.ask("POST", "/gradio_api/queue/join", asked)
    assert status == 200, answer
    status, _, stream = server.ask("GET", f"/gradio_api/queue/data?session_hash={asked['session_hash']}")
    assert status == 200
    found: list[Any] = [None] * len(functions[name]["outputs"])
    for message in events(stream):
        if (
            message.get("event_id") == answer["event_id"]
            and message["msg"].startswith("process_")
            and "output" in message
        ):
            assert message["success"], message
            for place, value in enumerate(message["output"]["data"]):
                if isinstance(value, list) and value and isinstance(value[0], list) and len(value[0]) == 3:
                    continue  # a difference to what came before
                if not (isinstance(value, dict) and value.get("__type__") == "update" and len(value) == 1):
                    found[place] = value
    return found


def events(stream: bytes) -> Iterator[dict[str, Any]]:
    for line in stream.decode().splitlines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def draw(server: Server, functions: dict[str, Any], **changes: Any) -> list[Any]:
    return call(server, functions, "draw", [*(FIELDS | changes).values(), None])


def fetched(server: Server, file: dict[str, Any]) -> Image.Image:
    status, headers, content = server.ask("GET", f"/gradio_api/file={file['path']}")
    assert status == 200 and headers["content-type"] == "image/png"
    return Image.open(BytesIO(content))


# ---------------------------------------------------------------------- what it answers
def test_the_page_is_there_and_nothing_on_it_comes_from_elsewhere(server: Server) -> None:
    status, headers, content = server.ask("GET", "/")
    assert status == 200 and b"sticker" in content
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
    assert not any("http" in sources or "*" in sources for sources in policy.values())


def test_it_asks_for_the_token(server: Server) -> None:
    """A browser shows its own dialogue, and sends the token as a password from then on."""
    status, headers, _ = server.ask("GET", "/", Authorization="")
    assert status == 401 and headers["www-authenticate"].startswith("Basic ")
    assert server.ask("GET", "/", Authorization=BASIC)[0] == 200
    for method, path in (("GET", "/config"), ("POST", "/gradio_api/queue/join"), ("GET", "/theme.css")):
        assert server.ask(method, path, Authorization="")[0] == 401
        assert server.ask(method, path, Authorization=BASIC, Origin="http://evil.example")[0] == 403


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=http://127.0.0.1/",
        "/gradio_api/file=../../etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/openapi.json",
        "/gradio_api/deep_link",
        "/gradio_api/runs",
        "/static/../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/index.html",
        "/monitoring",
        "/login",
        "/svelte/x",
        "/manifest.json",
    ],
)
def test_nothing_else_is_answered(server: Server, path: str) -> None:
    """Neither files of the machine nor other addresses can be read through it."""
    assert server.ask("GET", path)[0] == 404


@pytest.mark.parametrize("path", ["upload", "component_server", "run/draw", "api/draw", "call/draw", "stream/x"])
def test_nothing_is_uploaded_or_called_another_way(server: Server, path: str) -> None:
    assert server.ask("POST", f"/gradio_api/{path}", {"data": []})[0] == 404


@pytest.mark.parametrize("path", ["/etc/passwd", "http://127.0.0.1/"])
@pytest.mark.parametrize("inside", [False, True])
def test_no_file_is_named(server: Server, functions: dict[str, Any], path: str, inside: bool) -> None:
    """Gradio would read it, or fetch it, before any function of the page is called."""
    file: Any = {"path": path, "meta": {"_type": "gradio.FileData"}}
    asked = {"data": [[file] if inside else file], "fn_index": functions["settings"]["id"], "session_hash": "x"}
    status, _, answer = server.ask("POST", "/gradio_api/queue/join", asked)
    assert status == 422 and answer["error"]["param"] == "data"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fn_index": 10**9}, "fn_index must be the number of a function of the page, got 1000000000"),
        ({"fn_index": -1}, "fn_index must be the number of a function"),
        ({"fn_index": True}, "fn_index must be the number of a function"),
        ({"fn_index": None}, "fn_index must be the number of a function"),
        ({"session_hash": None}, "session_hash must have 1 to 64 letters and digits"),
        ({"session_hash": "x\n{}"}, "session_hash must have 1 to 64 letters and digits"),
        ({"data": ["a secret"]}, "data must have 16 values, got 1"),
        ({"position": None}, "data.2 must be a number, got a value of another kind"),
        ({"position": "x"}, "data.2 must be a number"),
        ({"transparent": "x"}, "data.3 must be true or false"),
        ({"steps": "nan"}, "data.6 must be a number or null"),
        ({"width": True}, "data.9 must be a number or null"),
        ({"prompt": 5}, "data.0 must be a text or null"),
    ],
)
def test_what_no_browser_sends(server: Server, functions: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    asked = {"data": [*FIELDS.values(), None], "fn_index": functions["draw"]["id"], "session_hash": "x"}
    fields = FIELDS | {name: value for name, value in changes.items() if name not in asked}
    asked |= {"data": [*fields.values(), None], **{name: changes[name] for name in asked if name in changes}}
    status, _, answer = server.ask("POST", "/gradio_api/queue/join", asked)
    assert status == 422 and words in answer["error"]["message"]


def test_the_log_keeps_its_form_whatever_comes(server: Server, functions: dict[str, Any]) -> None:
    """Neither tracebacks of Gradio nor what was entered are among its lines."""
    odd = [
        ("draw", [*(FIELDS | {"prompt": "a secret", "position": 99}).values(), None], {}),
        ("draw", [*(FIELDS | {"prompt": "a secret", "scheduler": "<b>\n{}"}).values(), None], {}),
        ("again", [None], {"event_data": {"index": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}}}),
        ("again", [None], {"event_data": 5}),
        ("again", [None], {}),
    ]
    before = len(server.log())
    for name, data, more in odd:
        asked = {"data": data, "fn_index": functions[name]["id"], "session_hash": uuid.uuid4().hex, **more}
        assert server.ask("POST", "/gradio_api/queue/join", asked)[0] == 200
        _, _, stream = server.ask("GET", f"/gradio_api/queue/data?session_hash={asked['session_hash']}")
        last = [message for message in events(stream) if message["msg"] == "process_completed"][-1]
        error = last["output"].get("error") or ""
        assert last["success"] == (name == "again") and "<b>" not in error, last
        assert name == "again" or "Value" in error, "it says what is wrong"
    assert "a secret" not in (server.folder / "err").read_text()
    assert not any("exception" in line for line in server.log()[before:])


def test_other_routes_are_as_without_it(server: Server) -> None:
    assert server.ask("GET", "/v1/images/generations")[0] == 405
    assert server.ask("GET", "/docs")[0] == 200
    assert not any("gradio" in path for path in server.ask("GET", "/openapi.json")[2]["paths"])


# ---------------------------------------------------------------------- what its buttons do
def test_drawing(server: Server, functions: dict[str, Any]) -> None:
    """It is the image of the other routes, and holds its settings, which the page takes back."""
    stands, image, layers, pair, *_ = draw(server, functions, transparent=True)
    assert "Seed 7: 4 steps" in stands and "not computed in full" in stands
    drawn = fetched(server, image)
    asked = {"prompt": FIELDS["prompt"], "seed": 7, "num_inference_steps": 4, "size": "48x48"}
    options = {"guidance_scale": 3.0, "quality": "low", "background": "transparent"}
    status, _, content = server.ask("POST", "/v1/images/generations", asked | options, Accept="image/png")
    assert status == 200 and Image.open(BytesIO(content)).tobytes() == drawn.tobytes() and drawn.mode == "RGBA"
    assert not pair["visible"] and not layers["visible"]
    _, _, content = server.ask("GET", f"/gradio_api/file={image['path']}")
    found = call(server, functions, "settings", [base64.b64encode(content).decode()])
    values = [value.get("value") if isinstance(value, dict) else value for value in found[: len(FIELDS)]]
    wanted = FIELDS | {"transparent": True, "image": None, "strength": None, "previews": None}  # these stay
    assert dict(zip(FIELDS, values, strict=True)) == wanted


def test_the_history_shows_an_image_and_its_settings_again(server: Server, functions: dict[str, Any]) -> None:
    page = uuid.uuid4().hex
    drawn = [
        call(server, functions, "draw", [*(FIELDS | {"seed": seed, "steps": 2}).values(), None], session_hash=page)
        for seed in ("1", "2")
    ]
    history = drawn[1][4]
    assert [entry["image"]["path"] for entry in history["value"]] == [one[1]["path"] for one in reversed(drawn)]
    event = {"index": 1, "value": None}
    found = call(server, functions, "again", [None], session_hash=page, event_data=event)
    assert found[1]["path"] == drawn[0][1]["path"] and found[4] == FIELDS["prompt"] and found[9] == "1"
    other = call(server, functions, "again", [None], event_data=event)  # of another page
    assert "panda" not in json.dumps(other) and ".png" not in json.dumps(other)


def test_comparing(server: Server, functions: dict[str, Any]) -> None:
    stands, image, _, pair, *_ = draw(server, functions, compare=True)
    assert " dB to that of every step" in stands and pair["visible"]
    every, fewer = (fetched(server, one) for one in pair["value"])
    assert fewer.tobytes() == fetched(server, image).convert(fewer.mode).tobytes() != every.tobytes()


def test_from_an_image(server: Server, functions: dict[str, Any]) -> None:
    """It is what /v1/images/edits draws; the history and the settings in the file do not have the image."""
    start = picture((32, 24), "RGB")
    address = "data:image/png;base64," + as_text(start)
    _, image, _, _, history, *_ = draw(server, functions, image=address, strength=0.5)
    form = {"prompt": FIELDS["prompt"], "seed": "7", "num_inference_steps": "4", "size": "48x48", "strength": "0.5"}
    form |= {"guidance_scale": "3", "speedup": "3"}
    headers = {"Authorization": f"Bearer {TOKEN}", "Accept": "image/png"}
    files = {"image": ("x.png", base64.b64decode(as_text(start)), "image/png")}
    found = requests.post(f"{server.url}/v1/images/edits", data=form, files=files, headers=headers, timeout=TIMEOUT)
    assert found.status_code == 200, found.text
    drawn = fetched(server, image)
    assert Image.open(BytesIO(found.content)).convert("RGB").tobytes() == drawn.convert("RGB").tobytes()
    _, settings = read_embedded(drawn, "x")
    assert settings is not None and settings["settings"]["image"] == "32x24 pixels"
    assert as_text(start) not in json.dumps(history)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (as_text(picture((264, 264))), "264x264 pixels, more than"),
        ("http://127.0.0.1/x.png", "as base64"),
        ("/etc/passwd", "as base64"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "not an image"),
    ],
)
def test_what_is_no_image(server: Server, functions: dict[str, Any], image: str, words: str) -> None:
    stands = html.unescape(draw(server, functions, image=image)[0])
    assert 'class="standing failed"' in stands and words in stands


def test_the_image_while_it_is_drawn(server: Server, functions: dict[str, Any]) -> None:
    """Several are seen before the last one, which is what it is without them."""
    files: dict[str, Any] = {}
    asked = [*(FIELDS | {"previews": True, "steps": 10, "position": 0}).values(), None]
    for shown in pictures_of(server, functions, asked):
        if "path" in shown:
            files[shown["path"]] = shown
    pictures = [fetched(server, file) for file in files.values()]
    assert 2 <= len(pictures) <= 5 and "preview" in next(iter(files))
    last = draw(server, functions, steps=10, position=0)[1]
    assert pictures[-1].tobytes() == fetched(server, last).tobytes() != pictures[0].tobytes()


def pictures_of(server: Server, functions: dict[str, Any], data: list[Any]) -> Iterator[dict[str, Any]]:
    """What a page is told of its picture while it draws: the first time all of it, then what changed."""
    asked = {"data": data, "fn_index": functions["draw"]["id"], "session_hash": uuid.uuid4().hex}
    assert server.ask("POST", "/gradio_api/queue/join", asked)[0] == 200
    _, _, stream = server.ask("GET", f"/gradio_api/queue/data?session_hash={asked['session_hash']}")
    shown: Any = None
    for message in events(stream):
        if message["msg"] == "process_generating":
            change = message["output"]["data"][1]
            shown = apply_diff(shown, change) if isinstance(change, list) else change
            yield shown


def test_loras(painter: Server) -> None:
    """Those that there are may be chosen, with a scale; what is drawn with them says so in its settings."""
    functions = {one["api_name"]: one for one in painter.ask("GET", "/config")[2]["dependencies"]}
    (line,) = (one for one in json.loads(call(painter, functions, "loras", [])[0]) if one["name"] == "first")
    assert line == {"name": "first", "on": False, "scale": 1}
    small = {"prompt": "red apple", "position": 0, "steps": 3, "width": 16, "height": 16}
    chosen = [json.dumps([line | {"on": on, "scale": 0.5}]) for on in (True, False)]
    with_it, without = (draw(painter, functions, **small, loras=text)[1] for text in chosen)
    assert fetched(painter, with_it).tobytes() != fetched(painter, without).tobytes()
    _, _, content = painter.ask("GET", f"/gradio_api/file={with_it['path']}")
    found = call(painter, functions, "settings", [base64.b64encode(content).decode()])
    back = json.loads(found[list(FIELDS).index("loras")])
    assert [one for one in back if one["on"]] == [line | {"on": True, "scale": 0.5}]
    for wrong in ("[3]", "{", "[" * 100_000, json.dumps([{"on": True, "name": "../x", "scale": 1}])):
        stands = draw(painter, functions, **small, loras=wrong)[0]
        assert ("there is no LoRA" in stands) == ("../x" in wrong), stands
    stands = draw(painter, functions, **small, loras=json.dumps([line | {"on": True, "scale": None}]))[0]
    assert "valid number" in stands


def test_the_slider_says_what_was_measured(server: Server, functions: dict[str, Any]) -> None:
    fast = next(plan for plan in load_shipped()["dpm"].members if plan.name == "fast")
    words = call(server, functions, "promise", [4, "", 20])[0]
    assert f"{down(fast.speedup, 1)} times" in words and f" {math.floor(fast.psnr_median or 0)} dB" in words
    assert "with 30 it may be less" in call(server, functions, "promise", [4, "", 30])[0]
    assert "Every step" in call(server, functions, "promise", [0, "", 20])[0]
    slider, words = call(server, functions, "choices", ["ddim", 50])
    assert slider["maximum"] == 6 and slider["visible"] and "50 steps" in words
    slider, words = call(server, functions, "choices", ["euler", 50])
    assert not slider["visible"] and "no tuned plans" in words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "  "}, "enter a prompt first"),
        ({"steps": 1001}, "num_inference_steps must be at most 1000"),
        ({"width": 1024, "height": 1024}, "more than the 16384 pixels"),
        ({"width": 50}, "multiple of 8"),
        ({"width": None}, "width and height, or neither"),
        ({"seed": "<b>7</b>"}, "seed must be a whole number"),
        ({"seed": str(2**63)}, "seed must be a whole number"),
        ({"guidance": -1}, "greater than or equal to 0"),
    ],
)
def test_what_is_refused_is_said_in_one_line(
    server: Server, functions: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    stands = draw(server, functions, **changes)[0]
    assert 'class="standing failed"' in stands and words in html.unescape(stands)
    assert "<b>" not in stands and "\n" not in stands


@contextlib.contextmanager
def drawing(server: Server, functions: dict[str, Any], page: str) -> Iterator[IO[bytes]]:
    """What a page hears of an image that takes long, from its first step on."""
    values = [*(FIELDS | {"steps": 100, "width": 128, "height": 128, "position": 0}).values(), None]
    asked = {"data": values, "fn_index": functions["draw"]["id"], "session_hash": page}
    assert server.ask("POST", "/gradio_api/queue/join", asked)[0] == 200
    lines = [f"GET /gradio_api/queue/data?session_hash={page} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: {BASIC}"]
    with server.raw("\r\n".join([*lines, "", ""]).encode()) as connection, connection.makefile("rb") as stream:
        next(line for line in stream if b" of 100" in line)
        yield stream


def test_a_page_that_goes_away_ends_its_request(server: Server, functions: dict[str, Any]) -> None:
    before = server.metric("requests_ended_total", outcome="cancelled")
    with drawing(server, functions, uuid.uuid4().hex):
        pass
    server.until("requests_ended_total", before + 1, outcome="cancelled")


def test_cancelling(server: Server, functions: dict[str, Any]) -> None:
    with drawing(server, functions, page := uuid.uuid4().hex) as stream:
        asked = {"data": [], "fn_index": functions["cancel"]["id"], "session_hash": page}
        assert server.ask("POST", "/gradio_api/queue/join", asked)[0] == 200
        assert next(line for line in stream if b"Cancelled." in line)


# ---------------------------------------------------------------------- without it
def test_switched_off(tmp_path: Path, folder: Path) -> None:
    with running(tmp_path, "--model", str(folder), "--no-page") as server:
        assert server.ask("GET", "/")[0] == 404 == server.ask("GET", "/config")[0]


def test_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page says how to install it; there is nothing else."""
    monkeypatch.setattr(route, "installed", lambda: False)
    page, sent = route.PageRoute(mock.Mock()), []

    async def send(message: Any) -> None:
        sent.append(message)

    for path in ("/", "/config"):
        scope = {"type": "http", "method": "GET", "path": path, "headers": []}
        match, more = page.matches(scope)
        assert match is Match.FULL
        asyncio.run(page.handle(scope | more, mock.AsyncMock(), send))
    assert [message["status"] for message in sent if "status" in message] == [200, 404]
    assert b"pip install 'diffusion-accel[ui]'" in sent[1]["body"]
