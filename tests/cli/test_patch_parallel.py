"""`--patch-parallel` from the command line: processes are started, one of them writes and prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import call
from PIL import Image

PROMPT = "red apple, 3d style"
COMMAND = ["generate", PROMPT, "--steps", "2", "--width", "128", "--height", "128"]


def torchrun(ranks: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, "-m", "diffusion_accel", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def same(one: Path, other: Path) -> bool:
    a, b = (np.asarray(Image.open(path), dtype=int) for path in (one, other))
    return bool(abs(a - b).max() <= 1)


def test_started_processes_draw_what_one_draws(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one, two = (tmp_path / f"{n}.png" for n in ("one", "two"))
    assert call(capfd, *COMMAND, "--seed", 1, "-q", "-o", one)[0] == 0
    code, out, err = call(capfd, *COMMAND, "--seed", 1, "--patch-parallel", "2,mode=sync", "--json", "-o", two)
    assert code == 0 and not err, err
    (line,) = out.splitlines()
    assert json.loads(line)["report"]["counters"]["patch_parallel"]["ranks"] == 2
    assert same(one, two)


@pytest.mark.slow
def test_joined_processes_draw_what_one_draws(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one, joined = (tmp_path / f"{n}.png" for n in ("one", "joined"))
    assert call(capfd, *COMMAND, "--seed", 1, "-q", "-o", one)[0] == 0
    done = torchrun(2, *COMMAND, "--seed", 1, "--patch-parallel", "mode=sync", "--json", "-o", joined)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and same(one, joined)


@pytest.mark.slow
def test_what_cannot_work_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Found by the processes, which all have it; one says so. Without a seed they agree on one before."""
    size = ["--width", "32", "--height", "32"]
    code, out, err = call(capfd, *COMMAND, *size, "--patch-parallel", "2", "-o", tmp_path / "a.png")
    assert code == 2 and not out
    note, error = err.splitlines()  # one of the processes says both
    assert note.startswith("note: the model was trained for 96x96") and not list(tmp_path.iterdir())
    assert error.startswith("error: latents of 4x4 are too small for 2 processes"), err


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "number of processes"),
        (["2,mode=fast"], "sync, displaced"),
        (["2,p=7"], "0 to 1"),
        (["x=1"], "unknown key"),
    ],
)
def test_bad_values_are_one_line(
    value: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusion_accel.cli import main as cli

    with pytest.raises(SystemExit) as stopped:
        cli.main([*COMMAND, "-o", str(tmp_path / "a.png"), "--patch-parallel", *value])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and says in error and len(error.splitlines()) == 1


def test_the_first_failure_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A process that was killed, one that says why before the others notice, and one that says nothing."""
    from diffusion_accel.parallel.launch import ProcessFailedError, start

    def failure(ranks: int, code: str) -> ProcessFailedError:
        begin = (
            "import os, pathlib, signal, sys, time; rank = int(os.environ['RANK'])\n"
            f"from diffusion_accel.parallel import launch; left = pathlib.Path({str(tmp_path / 'left')!r})"
        )
        with pytest.raises(ProcessFailedError) as failed:
            start(ranks, ["-c", f"{begin}\n{code}"])
        return failed.value

    follows = "launch.leave_message('lost', 1, consequence=True); sys.exit(1)"
    os.mkfifo(tmp_path / "peer")  # whose end tells rank 0, as that of a connection does
    peer = f"peer = open({str(tmp_path / 'peer')!r}, 'w' if rank else 'r')"
    killed = failure(2, f"{peer}\nif rank: os.kill(os.getpid(), signal.SIGKILL)\npeer.read()\n{follows}")
    assert str(killed).startswith("process 1 of 2 was killed by SIGKILL") and killed.exit_code == 1
    tells = "if rank == 2: launch.leave_message('no such file', 2); left.touch(); time.sleep(60)"  # slow to end
    told = failure(3, f"{tells}\nwhile not left.exists(): time.sleep(0.01)\n{follows}")
    assert (str(told), told.exit_code) == ("no such file", 2)
    silent = failure(2, "if rank: sys.exit(3)\ntime.sleep(60)")
    assert str(silent).startswith("process 1 of 2 failed") and silent.exit_code == 3
    start(2, ["-c", "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['WORLD_SIZE'])"])
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 1 and out.split()[1] == "2" and not err


@pytest.mark.parametrize("environment", [{"RANK": "1"}, {"RANK": "x"}, {"RANK": "1", "WORLD_SIZE": "abc"}])
def test_what_a_launcher_left_in_the_environment(
    environment: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes nothing without --patch-parallel, and is refused with it; nothing fails without a word."""
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert call(capsys, "models")[0] == 0
    code, _, err = call(capsys, *COMMAND, "--steps", "0")
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1
    code, _, err = call(capsys, *COMMAND, "--patch-parallel", "2")
    assert code == 2 and err.startswith(("error: RANK", "error: WORLD_SIZE")) and len(err.splitlines()) == 1
