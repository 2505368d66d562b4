"""Every example runs as it stands and writes what its first lines promise."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from http_server import TOKEN, running
from PIL import Image

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
ELSEWHERE = {"several_processes", "server_client"}  # by tests of their own


def written(example: Path) -> list[str]:
    """The images that an example says it writes."""
    docstring = example.read_text(encoding="utf-8").split('"""')[1]
    return re.findall(r"[\w-]+\.png", docstring)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(example: Path, folder: Path) -> None:
    assert written(example)
    for name in written(example):
        with Image.open(folder / name) as image:
            assert min(image.size) >= 96 and image.convert("RGB").getextrema() != ((0, 0),) * 3


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.stem not in ELSEWHERE], ids=lambda e: e.stem)
def test_it_runs(example: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example), run_name="__main__")
    check(example, folder)
    assert capsys.readouterr().out


def test_one_image_by_two_processes(folder: Path) -> None:
    example = FOLDER / "several_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(example)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert found.returncode == 0, found.stderr
    check(example, folder)
    with Image.open("shared.png") as image:
        shared = image.tobytes()
    runpy.run_path(str(example), run_name="__main__")
    with Image.open("shared.png") as image:
        assert max(abs(a - b) for a, b in zip(shared, image.tobytes(), strict=True)) <= 1


def test_the_client_asks_a_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = FOLDER / "server_client.py"
    monkeypatch.setenv("DIFFUSION_ACCEL_TOKEN", TOKEN)
    with running(folder, "--transparent", "--no-page") as server:
        monkeypatch.setattr(sys, "argv", [example.name, server.url])
        runpy.run_path(str(example), run_name="__main__")
    check(example, folder)
    with Image.open("served.png") as image:
        assert image.mode == "RGBA"


def test_they_are_short_and_named_in_the_readme_of_the_folder() -> None:
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    for example in EXAMPLES:
        assert f"({example.name})" in listed
        assert len(example.read_text(encoding="utf-8").splitlines()) <= 40
