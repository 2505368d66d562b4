"""`generate --distribute prompts` with real processes: killed, resumed, launched together."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGKILL
from typing import Any

import forks
import interrupted
import numpy as np
import pytest
from command import call
from model_folder import write_folder
from PIL import Image

PROMPTS = ("red", "apple", "pear", "lead")  # of no more tokens than the model reads
WAIT = 120  # seconds, for a busy machine


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command without its folder."""
    folder = tmp_path_factory.mktemp("model")
    write_folder(folder / "tiny")
    lines = [{"prompt": prompt, **({"count": 2} if prompt == "apple" else {})} for prompt in PROMPTS]
    (folder / "big.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--prompts-file", folder / "big.jsonl", "--model", folder / "tiny", "--steps", 2, "--seed", 5]
    return ["generate", *map(str, given), "--device", "cpu", "--distribute", "prompts", "-o"]


@pytest.fixture(scope="module")
def alone(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process draws that nothing disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    process = begin(folder, [*words, str(folder / "images")])
    process.join(WAIT)
    assert process.exitcode == 0, (folder / "err").read_text()
    return images(folder / "images")


def begin(folder: Path, arguments: list[str], moment: str = "any_moment", **environment: str) -> BaseProcess:
    folder.mkdir(exist_ok=True)
    return forks.start(interrupted.command, folder, folder, arguments, moment, **environment)


def images(folder: Path) -> dict[str, Any]:
    """Pixels and metadata by name, without times; nothing else is there."""
    found = {}
    for file in sorted(folder.iterdir()):
        if file.name != ".diffusion-accel":
            with Image.open(file) as image:
                data = json.loads(image.text["diffusion_accel"])
                seconds = data["report"].pop("seconds")
                assert seconds > 0
                found[file.name] = (np.asarray(image).tolist(), image.text["parameters"], data)
    return found


def until(condition: Callable[[], bool], process: BaseProcess) -> None:
    limit = time.monotonic() + WAIT
    while not condition():
        assert process.is_alive() and time.monotonic() < limit
        time.sleep(0.01)


def test_one_is_killed_and_the_other_draws_what_it_left(
    words: list[str], alone: dict[str, Any], tmp_path: Path
) -> None:
    """The first one dies while it writes its second image, which the other one waits for."""
    assert len(alone) == 5
    folder = tmp_path / "out"
    one = begin(tmp_path / "one", [*words, str(folder)], "second_image")
    until((tmp_path / "one" / "arrived").exists, one)
    other = begin(tmp_path / "other", [*words, str(folder)])
    until(lambda: len(list(folder.glob("[!.]*.png"))) == 3, other)  # all that it may draw meanwhile
    assert one.is_alive() and len(list(folder.glob(".*.tmp.png"))) == 1
    os.kill(one.pid or 0, SIGKILL)
    other.join(WAIT)
    assert other.exitcode == 0, (tmp_path / "other" / "err").read_text()
    assert images(folder) == alone
    assert (tmp_path / "other" / "out").read_text().endswith("3 of 4 prompts were drawn, 1 were there before\n")


def test_all_are_killed_and_the_same_command_goes_on(
    words: list[str], alone: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    one = begin(tmp_path / "one", [*words, str(folder)], "second_image")
    until((tmp_path / "one" / "arrived").exists, one)
    os.kill(one.pid or 0, SIGKILL)
    one.join(WAIT)
    (finished,) = folder.glob("[!.]*.png")
    before = finished.stat().st_ino
    code, out, err = call(capsys, *words, folder, "--json")
    assert (code, err) == (0, "")
    assert sorted(Path(json.loads(line)["path"]).name for line in out.splitlines()) == sorted(
        {*alone} - {finished.name}
    )
    assert images(folder) == alone and finished.stat().st_ino == before
    assert call(capsys, *words, folder) == (0, "0 of 4 prompts were drawn, 4 were there before\n", "")


def test_launched_together_one_failed_prompt_ends_no_other(tmp_path: Path, words: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = [*words, str(tmp_path / "out"), "bad"]
    both = [begin(tmp_path / rank, arguments, "bad_prompt", RANK=rank, **job) for rank in ("0", "1")]
    for process in both:
        process.join(WAIT)
    out, err = ("".join((tmp_path / rank / name).read_text() for rank in ("0", "1")) for name in ("out", "err"))
    assert [process.exitcode for process in both] == [1, 0], err
    lines = sorted(err.splitlines())
    assert lines[0].startswith("error: 1 of 5 prompts failed (1); all others are there, and the same command")
    assert lines[1:] == ["prompt 1 failed ('bad'): no memory"]
    assert "4 of 5 prompts were drawn" in out and ", 0 were there before, 1 failed\n" in out
    assert out.count(".png") == 5 == len(list((tmp_path / "out").glob("*.png")))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--patch-parallel", "2"], "cannot be combined with --patch-parallel"),
        (["--overwrite"], "cannot be combined with --overwrite"),
        (["--reuse", "--compare"], "cannot be combined with --compare"),
        (["--reuse", "auto"], "cannot be combined with --reuse auto"),
        (["-o", "a.png"], "needs -o to be a folder"),
        (["--distribute", "images"], "--distribute must be prompts, got 'images'"),
    ],
)
def test_what_cannot_be_combined(
    flags: list[str], says: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, *words, tmp_path / "out", *flags)
    assert code == 2 and says in err and len(err.splitlines()) == 1 and not out
    assert not list(tmp_path.iterdir())
