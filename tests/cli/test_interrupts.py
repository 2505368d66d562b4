"""Signals at moments that are known: every program ends with one line, the right exit code and nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM, Signals
from unittest import mock

import forks
import interrupted
import pytest
from command import call

WAIT = 120  # seconds, for a busy machine; nothing here takes one


def until(condition: Callable[[], bool], alive: Callable[[], bool] = lambda: True) -> None:
    limit = time.monotonic() + WAIT
    while not condition():
        assert alive() and time.monotonic() < limit
        time.sleep(0.01)


def end(process: BaseProcess, folder: Path, number: Signals, at: str = "arrived") -> tuple[int | None, str]:
    """Send the signal when the moment has come; exit code and stderr."""
    try:
        until((folder / at).exists, process.is_alive)
        os.kill(process.pid or 0, number)
        process.join(WAIT)
        return process.exitcode, (folder / "err").read_text()
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("moment", "number", "says"),
    [
        ("loading", SIGINT, "nothing was written"),
        ("second_image", SIGTERM, "1 of 2 images were written"),
        ("searching", SIGHUP, "call it again to go on from here (o.json.search)"),
        ("learning", SIGTERM, "call it again to go on from here (solver.search)"),
        ("quantizing", SIGINT, "call it again to go on from here (q.work)"),
    ],
)
def test_commands(moment: str, number: Signals, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    words = {
        "loading": ["generate", "red apple", "-o", "o.png"],
        "second_image": ["generate", "red apple", "red heart", "--steps", "1", "-q", "-o", "o.png"],
        "searching": ["tune", "--speedup", "2", "-q", "-o", "o.json"],
        "learning": ["tune", "--evaluations", "6", "-q", "-o", "solver/"],
        "quantizing": ["quantize", "-q", "-o", "q"],
    }[moment]
    monkeypatch.chdir(tmp_path / "work")
    process = forks.start(interrupted.command, tmp_path, Path.cwd(), words, moment)
    code, err = end(process, tmp_path, number)
    assert (code, err) == (128 + number, f"error: interrupted; {says}\n")
    expected = {
        "second_image": ["o-1.png"],
        "searching": ["o.json.search"],
        "learning": ["solver.search"],
        "quantizing": ["q.work"],
    }
    assert os.listdir() == expected.get(moment, []) and not (tmp_path / "out").read_text()


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    words = ["generate", "red apple", "-o", str(tmp_path / "o.png")]
    process = forks.start(interrupted.command, tmp_path, tmp_path, words, "ignoring_hangups")
    until((tmp_path / "arrived").exists, process.is_alive)
    os.kill(process.pid or 0, SIGHUP)
    assert end(process, tmp_path, SIGTERM) == (143, "error: interrupted; nothing was written\n")


def test_a_reader_that_goes_away_ends_it_without_a_word(tmp_path: Path) -> None:
    process = forks.start(interrupted.command, tmp_path, tmp_path, ["features"], "nobody_reads")
    process.join(WAIT)
    assert (process.exitcode, (tmp_path / "err").read_text()) == (1, "")


def test_while_libraries_are_imported(tmp_path: Path) -> None:
    """Real processes, as `python -m` and as the installed command; the library that they import is not a real one."""
    (script,) = metadata.entry_points(group="console_scripts", name="diffusion-accel")
    (tmp_path / "typer.py").write_text(
        f"import pathlib, interrupted; interrupted.arrive(pathlib.Path({str(tmp_path)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"}
    for start in (["-m", "diffusion_accel"], ["-c", f"from {script.module} import {script.attr} as r; r()"]):
        (tmp_path / "arrived").unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, *start, "info"], env=environment, stderr=subprocess.PIPE, text=True)
        until((tmp_path / "arrived").exists, lambda: process.poll() is None)  # noqa: B023
        process.send_signal(SIGTERM)
        assert process.communicate(timeout=WAIT)[1] == "error: interrupted; nothing was written\n"
        assert process.returncode == 143


def test_signals_that_come_while_it_tidies_up_change_nothing(tmp_path: Path) -> None:
    process = forks.start(interrupted.again_while_tidying, tmp_path)
    assert end(process, tmp_path, SIGINT) == (130, "interrupted; nothing was written\n")
    assert not (tmp_path / "half").exists()


def test_a_loop_that_saves_has_one_signal_to_do_so(tmp_path: Path) -> None:
    process = forks.start(interrupted.postponed, tmp_path)
    until((tmp_path / "first").exists, process.is_alive)
    os.kill(process.pid or 0, SIGTERM)
    assert end(process, tmp_path, SIGINT) == (130, "interrupted; the state is saved\n")


def test_a_fork_is_another_program(tmp_path: Path) -> None:
    process = forks.start(interrupted.fork, tmp_path)
    process.join(WAIT)
    assert process.exitcode == 0, (tmp_path / "err").read_text()


def test_called_in_a_program_it_is_python_s_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion_accel.cli.info.collect", mock.Mock(side_effect=KeyboardInterrupt))
    assert call(capsys, "info") == (130, "", "error: interrupted; nothing was written\n")


@pytest.mark.parametrize(
    ("name", "words"),
    [("train_diffusion", ["--data", "x", "--model", "unet"]), ("train_sticker", ["denoiser"])],
)
def test_scripts(name: str, words: list[str], tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    process = forks.start(interrupted.trainer, tmp_path, script, [*words, "--work", str(tmp_path / "runs")])
    assert end(process, tmp_path, SIGTERM) == (143, "error: interrupted; nothing was written\n")


# ---------------------------------------------------------------------- processes that a process started
@pytest.fixture
def alive(tmp_path: Path) -> Callable[[], bool]:
    """Whether a process still holds the file `alive` of the folder open."""
    os.mkfifo(tmp_path / "alive")
    reading = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)

    def somebody() -> bool:
        try:
            return os.read(reading, 1) != b""
        except BlockingIOError:
            return True

    return somebody


def test_helpers_end_with_it(tmp_path: Path, alive: Callable[[], bool]) -> None:
    process = forks.start(interrupted.with_a_helper, tmp_path)
    until((tmp_path / "arrived").exists, process.is_alive)
    assert alive()
    assert end(process, tmp_path, SIGINT)[0] == 130
    until(lambda: not alive())


def test_a_benchmark_s_other_process_ends_with_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "asked")
    process = forks.start(interrupted.peer, tmp_path)
    with (tmp_path / "asked").open("w") as asking:
        asking.write('{"job": {"model": "sticker", "prompts": [], "steps": 1}, "entry": {"kind": "baseline"}}\n')
        asking.flush()
        until((tmp_path / "arrived").exists, process.is_alive)
    process.join(WAIT)
    assert process.exitcode == 1


@pytest.mark.parametrize(("number", "how"), [(SIGINT, "running"), (SIGKILL, "running"), (SIGKILL, "stopped")])
def test_processes_end_with_their_launcher(
    number: Signals, how: str, tmp_path: Path, alive: Callable[[], bool]
) -> None:
    """Rank 0 knows what was written. Killed, the launcher can tell nobody: they notice, also one that is stopped."""
    process = forks.start(interrupted.launcher, tmp_path, how)
    until(lambda: all((tmp_path / f"rank {rank}").exists() for rank in (0, 1)), process.is_alive)
    assert alive()
    code, err = end(process, tmp_path, number, "rank 0")
    said = "interrupted; 1 of 3 images were written\n"
    assert (code, err) == ((130, said) if number == SIGINT else (-number, ""))
    until(lambda: not alive())
