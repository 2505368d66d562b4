"""The examples of docs/serving.md, its guide and the README do what they say."""

from __future__ import annotations

import json
import re
import shlex
from io import BytesIO
from pathlib import Path

import pytest
from http_server import TOKEN, Server
from PIL import Image

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.chdir(tmp_path)
    text = PYTHON[number].replace("8000", str(server.port)).replace('"none"', repr(TOKEN))
    assert text != PYTHON[number]
    exec(text, {})
    (image,) = tmp_path.glob("*.png")
    with Image.open(image) as made:
        assert made.size == (96, 96)


@pytest.mark.parametrize("page", ["docs/serving.md", "docs/guides/serving.md", "README.md"])
def test_curl(server: Server, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("$ curl"))
    words = shlex.split(line)
    path = words[2].removeprefix("http://127.0.0.1:8000")
    headers = [words[k + 1].partition(": ") for k, word in enumerate(words) if word == "-H"]
    body = json.loads(words[words.index("-d") + 1])
    named = {name.replace("-", "_"): value for name, _, value in headers}
    status, found, content = server.ask("POST", path, body, **named)
    assert status == 200 and found["content-type"] == "image/png"
    assert Image.open(BytesIO(content)).mode == "RGBA"
    assert server.ask("POST", path, body | {"n": 2}, **named)[0] == 400


def test_every_route_is_in_the_table(server: Server) -> None:
    for path in server.ask("GET", "/openapi.json")[2]["paths"]:
        assert path.startswith("/sdapi") or re.sub(r"\{.*", "", path).removesuffix("unload").rstrip("/") in DOCS
