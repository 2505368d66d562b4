"""LoRAs by the names that the server knows, never by a path or an address."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from http_server import Server

from .conftest import write_lora

ASKED = {"prompt": "red apple", "seed": 3}


def image(server: Server, **more: Any) -> str:
    status, _, body = server.ask("POST", "/v1/images/generations", ASKED | more)
    assert status == 200, body
    return str(body["data"][0]["b64_json"])


def test_loaded_and_unloaded(painter: Server, loras: Path) -> None:
    plain, first = image(painter), image(painter, lora={"first": 1.0})
    assert plain != first == image(painter, lora={"first": 1})
    web = painter.ask("POST", "/sdapi/v1/txt2img", {"prompt": "red apple <lora:first:1>", "seed": 3})[2]
    assert web["images"] == [first]
    write_lora(loras / "second.safetensors", 1)
    assert painter.ask("GET", "/v1/loras")[2] == {"loras": ["first"]}
    assert painter.ask("POST", "/v1/loras/load", {"name": "second"})[2] == {"loras": ["first", "second"]}
    second = image(painter, lora={"second": 1.0})
    assert second not in (plain, first)
    write_lora(loras / "second.safetensors", 2)
    assert image(painter, lora={"second": 1.0}) == second  # until it is loaded again
    painter.ask("POST", "/v1/loras/load", {"name": "second"})
    assert image(painter, lora={"second": 1.0}) not in (plain, first, second)
    assert painter.ask("POST", "/v1/loras/unload", {"name": "second"})[2] == {"loras": ["first"]}
    assert painter.ask("POST", "/v1/images/generations", ASKED | {"lora": {"second": 1}})[0] == 400
    assert image(painter) == plain and image(painter, lora={"first": 1.0}) == first


@pytest.mark.parametrize("name", ["other", "../loras/first", "/etc/passwd", "http://x/y", "first.safetensors", "."])
def test_no_such_lora(painter: Server, name: str) -> None:
    for path in ("load", "unload"):
        assert painter.ask("POST", f"/v1/loras/{path}", {"name": name})[0] == 404
    status, _, body = painter.ask("POST", "/v1/images/generations", ASKED | {"lora": {name: 1.0}})
    assert status == 400 and "there is no LoRA" in body["error"]["message"]


def test_only_where_it_is_allowed(server: Server) -> None:
    for path in ("load", "unload"):
        status, _, body = server.ask("POST", f"/v1/loras/{path}", {"name": "first"})
        assert status == 403 and body["error"]["code"] == "not_enabled"
    assert server.ask("GET", "/v1/loras")[2] == {"loras": []}


def test_from_which_step_on_it_acts(painter: Server) -> None:
    """One in memory acts from the first, whatever the deadline; others: tests/serving/test_adapters.py."""
    first = image(painter, lora={"first": 1.0})
    status, _, body = painter.ask(
        "POST", "/v1/images/generations", ASKED | {"lora": {"first": 1.0}, "lora_deadline": 2}
    )
    assert status == 200 and body["usage"]["lora_step"] == 0 and body["data"][0]["b64_json"] == first
    assert painter.ask("POST", "/v1/images/generations", ASKED)[2]["usage"]["lora_step"] is None
    accepts = {"Accept": "image/png"}
    for more, step in (({"lora": {"first": 1.0}}, "0"), ({}, None)):
        _, headers, _ = painter.ask("POST", "/v1/images/generations", ASKED | more, **accepts)
        assert headers.get("x-lora-step") == step and headers["content-type"] == "image/png"
    for more, status in (({"lora_deadline": 1}, 400), ({"lora": {"first": 1}, "lora_deadline": -1}, 422)):
        assert painter.ask("POST", "/v1/images/generations", ASKED | more)[0] == status
