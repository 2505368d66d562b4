"""The process of another accelerator: what it started ends with it."""

from __future__ import annotations

import subprocess
import sys

from diffusion_accel.bench.worker import WithChildren

FORKS = """
import os, time
if os.fork() == 0:
    time.sleep(600)
print("started", flush=True)
time.sleep(600)
"""


def test_children_end_with_it_and_leave_its_pipe() -> None:
    process = WithChildren([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.kill()
    assert process.communicate(timeout=60) == ("", None), "the child kept the pipe open"
    assert process.returncode != 0
    process.kill()  # once more does nothing
