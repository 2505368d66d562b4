"""What the processes of `cli/test_interrupts.py` run: a program that comes to a moment and stays there."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

LAUNCHED = """
import os, pathlib, signal, sys
from diffusion_accel import interrupts
from diffusion_accel.parallel import launch
from interrupted import arrive
folder, rank, how = pathlib.Path(sys.argv[1]), os.environ["RANK"], sys.argv[2]
launch.follow()
alive = (folder / "alive").open("w")  # closed when the last of the processes has ended
interrupts.explain(lambda: "1 of 3 images were written")
if rank == "1" and how == "stopped":
    (folder / "rank 1").touch()
    os.kill(os.getpid(), signal.SIGSTOP)
arrive(folder, f"rank {rank}")
"""


def arrive(folder: Path, name: str = "arrived") -> NoReturn:
    """Say that the moment has come, and stay in it, as a library does that swallows every exception."""
    (folder / name).touch()
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass


def begin(folder: Path) -> None:
    """Output to files; signals as a shell leaves them."""
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    multiprocessing.set_start_method("fork", force=True)  # as anywhere else; else tqdm's lock outlives the process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# ---------------------------------------------------------------------- the command line
def command(folder: Path, here: Path, arguments: list[str], moment: str, **environment: str) -> None:
    """`diffusion-accel ARGUMENTS` in the folder `here`, which comes to one of the moments below."""
    begin(folder)
    os.chdir(here)
    os.environ.update(environment)
    MOMENTS[moment](folder)
    from diffusion_accel.cli.main import run

    run(arguments)


def _replace(name: str, value: Any) -> None:
    mock.patch(name, value).start()


def loading(folder: Path) -> None:
    _replace("diffusion_accel.cli.session.open_for", lambda *_, **__: arrive(folder))


def second_image(folder: Path) -> None:
    """Half of it is written."""
    from PIL import Image

    save, saved = Image.Image.save, []

    def slow(image: Any, file: Path, *more: Any, **named: Any) -> None:
        if saved:
            Path(file).write_bytes(b"\x89PNG")
            arrive(folder)
        saved.append(file)
        save(image, file, *more, **named)

    _replace("PIL.Image.Image.save", slow)


def bad_prompt(folder: Path) -> None:
    """One prompt, "bad", cannot be drawn."""
    from diffusion_accel.cli import session

    prepare = session.prepare

    def prepared(pipe: Any, request: Any) -> Any:
        if request.prompt == "bad":
            raise RuntimeError("no memory\nfor this one")
        return prepare(pipe, request)

    _replace("diffusion_accel.cli.session.prepare", prepared)


def ignoring_hangups(folder: Path) -> None:
    """Started by nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    loading(folder)


def searching(folder: Path) -> None:
    def search(*_: Any, state: Path, **__: Any) -> None:
        state.write_text("{}\n")
        arrive(folder)

    _replace("diffusion_accel.cli.session.open_for", mock.MagicMock())
    _replace("diffusion_accel.tuning.tuner.tune", search)


def learning(folder: Path) -> None:
    def learn(*_: Any, state: Path, **__: Any) -> None:
        state.write_text("{}\n")
        arrive(folder)

    _replace("diffusion_accel.cli.session.open_for", mock.MagicMock())
    _replace("diffusion_accel.tuning.solver.tune_solver", learn)


def quantizing(folder: Path) -> None:
    def quantize(*_: Any, output: Path, **__: Any) -> None:
        output.with_name(f"{output.name}.work").mkdir()
        arrive(folder)

    _replace("diffusion_accel.cli.session.open_for", mock.MagicMock())
    _replace("diffusion_accel.quantize", quantize)


def any_moment(_: Path) -> None:
    """The program as it is; what sends the signal chooses when."""


def nobody_reads(folder: Path) -> None:
    """`| head`, which has ended."""
    receiving, sending = os.pipe()
    os.close(receiving)
    os.dup2(sending, sys.stdout.fileno())
    sys.stdout = open(sys.stdout.fileno(), "w")


MOMENTS: dict[str, Callable[[Path], None]] = {
    f.__name__: f
    for f in (
        loading,
        second_image,
        bad_prompt,
        ignoring_hangups,
        searching,
        learning,
        quantizing,
        any_moment,
        nobody_reads,
    )
}


# ---------------------------------------------------------------------- parts of it
def _install(folder: Path) -> None:
    from diffusion_accel import interrupts

    begin(folder)
    interrupts.install(lambda text, code: interrupts.write_line(text))


def again_while_tidying(folder: Path) -> None:
    """Signals keep coming while a half-written folder is removed."""
    from diffusion_accel import interrupts

    _install(folder)
    remove = shutil.rmtree

    def slow(path: Path, **named: Any) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        remove(path, **named)

    _replace("shutil.rmtree", slow)
    with interrupts.unfinished(folder / "half") as half:
        half.mkdir()
        (half / "file").touch()
        arrive(folder)


def with_a_helper(folder: Path) -> None:
    """A process that this one started, and that does not listen."""
    from diffusion_accel import interrupts

    _install(folder)
    code = f"import signal; signal.signal(2, signal.SIG_IGN); open({str(folder / 'up')!r}, 'w'); signal.pause()"
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=(folder / "alive").open("w"))
    with interrupts.helper(process):
        while not (folder / "up").exists():
            time.sleep(0.01)
        arrive(folder)


def launcher(folder: Path, how: str) -> None:
    from diffusion_accel.parallel import launch

    _install(folder)
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(Path(__file__).parent)}):
        launch.start(2, ["-c", LAUNCHED, str(folder), how])


def peer(folder: Path) -> None:
    """A benchmark's process for another package, in the middle of its work."""
    begin(folder)
    sys.stdin = (folder / "asked").open()
    _replace("diffusion_accel.bench.worker.Runner", lambda job: arrive(folder))
    from diffusion_accel.bench.lines import serve
    from diffusion_accel.bench.worker import Worker

    serve(Worker())


def trainer(folder: Path, script: Path, words: list[str]) -> None:
    """A script of a maintainer, run as a program."""
    begin(folder)
    _replace("training_setup.make_accelerator", lambda options: arrive(folder))
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


def fork(folder: Path) -> None:
    """A fork hears signals as if nothing had been installed."""
    _install(folder)
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM, status
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def postponed(folder: Path) -> None:
    """A loop that finishes its step and saves, and is not let finish it the second time."""
    from diffusion_accel import interrupts

    _install(folder)
    interrupts.explain(lambda: "the state is saved")
    with interrupts.postponed() as signals:
        (folder / "first").touch()
        while signals.received is None:
            time.sleep(0.01)
        assert signals.received == signal.SIGTERM
        arrive(folder)
