"""The page in a real browser: a prompt is entered, an image is seen, and its settings are taken back from its file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from http_server import TOKEN, Server
from PIL import Image

from diffusion_accel.image_metadata import read_embedded

from .test_edits import picture

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'diffusion-accel[ui]'")
browsers = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
PATIENCE = 120_000  # milliseconds after which a test has failed


@contextmanager
def opened(server: Server) -> Iterator[Any]:
    """The page, with the token as a browser's dialogue takes it."""
    with browsers.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        made = browser.new_page(http_credentials={"username": "anybody", "password": TOKEN})
        made.set_default_timeout(PATIENCE)
        made.goto(server.url)
        made.wait_for_selector("#prompt textarea")
        yield made
        browser.close()


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    with opened(server) as made:
        yield made


def test_from_an_image_and_with_loras(painter: Server, tmp_path: Path) -> None:
    """What is dropped and chosen is what is drawn from, also after settings were taken over."""
    wrong, start = [], tmp_path / "start.png"
    picture((40, 24)).save(start)
    (tmp_path / "broken.png").write_bytes(b"x")
    with opened(painter) as page:
        page.on("pageerror", lambda error: wrong.append(str(error)))
        for words in ("Start from an image", "LoRAs", "More settings"):
            page.get_by_role("button", name=words).click()
        page.get_by_label("first", exact=True).check()
        page.get_by_label("scale of first").fill("0.5")
        page.set_input_files("#start input", start)
        page.wait_for_function("document.querySelector('#start img').naturalWidth == 40")
        page.set_input_files("#drop input", tmp_path / "broken.png")
        page.wait_for_selector(".standing.failed")
        page.fill("#prompt textarea", "red apple")
        page.click("#draw")
        page.wait_for_function("document.querySelector('#standing').innerText.includes('steps')")
        with page.expect_download() as loading:
            page.locator("#picture").get_by_role("button", name="Download").click()
        loading.value.save_as(file := tmp_path / "drawn.png")
        with Image.open(file) as image:
            _, found = read_embedded(image, "x")
        assert found is not None and found["settings"]["image"] == "40x24 pixels"
        assert found["settings"]["loras"] == {"first": 0.5} and found["settings"]["strength"] == 0.6
        page.get_by_label("first", exact=True).uncheck()
        page.set_input_files("#drop input", file)
        page.wait_for_function("document.querySelector('#loras input').checked")
        page.locator("#start").get_by_role("button", name="Remove").click()
        assert page.locator("#start img").is_hidden()
    assert not wrong


def test_drawing(server: Server, page: Any, tmp_path: Path) -> None:
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    assert "sticker" in page.inner_text("#head")

    page.locator("#slider input[type=range]").focus()
    page.keyboard.press("Home")
    page.wait_for_function("document.querySelector('#promise').innerText.includes('Every step')")
    page.keyboard.press("End")
    page.wait_for_function("document.querySelector('#promise').innerText.includes('3.5 times as fast')")

    prompt = "panda, 3d style <img src=x onerror=alert(1)>"
    page.fill("#prompt textarea", prompt)
    page.get_by_label("Transparent").check()
    page.get_by_text("More settings").click()
    page.get_by_label("Seed").fill("7")
    page.click("#draw")
    image = page.wait_for_selector("#picture img")
    page.wait_for_function("document.querySelector('#standing').innerText.includes('Seed 7: 20 steps')")
    assert image.evaluate("async image => { await image.decode(); return image.naturalWidth }") == 96
    assert "conic-gradient" in image.evaluate("image => getComputedStyle(image).backgroundImage")

    file = tmp_path / "drawn.png"
    with page.expect_download() as loading:
        page.locator("#picture").get_by_role("button", name="Download").click()
    loading.value.save_as(file)
    page.fill("#prompt textarea", "something else")
    page.set_input_files("#drop input", file)
    page.wait_for_function("text => document.querySelector('#prompt textarea').value == text", arg=prompt)
    assert "settings of the image" in page.inner_text("#standing")

    page.fill("#prompt textarea", "  ")
    page.click("#draw")
    assert "enter a prompt first" in page.wait_for_selector(".standing.failed").inner_text()
    assert not wrong and all(url.startswith((server.url, "data:", "blob:")) for url in asked)
