"""Runs one accelerator that patches things in a process of its own, which is told what to do in JSON lines.

The process is started as a program (`python -m diffusion_accel.bench.worker`) and not by `multiprocessing`, whose new
processes import the caller's main program: a notebook or a script of a few lines can call `benchmark` as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from diffusion_accel import interrupts

from .entries import Entry
from .runner import Facts, Job, Runner

MARK = "@bench "


class Isolated:
    """A `Runner` for one peer in its own process. Raises `RuntimeError` with the reason if that one fails."""

    def __init__(self, job: Job, entry: Entry) -> None:
        self._open = contextlib.ExitStack()
        self.folder = self._open.enter_context(interrupts.temporary_folder())
        self.log = self._open.enter_context((self.folder / "log").open("w+"))
        command = [sys.executable, "-m", "diffusion_accel.bench.worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self._open.enter_context(interrupts.helper(self.process))
        try:
            self.ask({"job": asdict(job), "entry": asdict(entry)})
        except BaseException:
            self.close()
            raise

    def ask(self, command: dict[str, Any]) -> Any:
        """Have one thing done.

        Returns:
            What the process answers.

        Raises:
            RuntimeError: it failed there, or the process ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith(MARK):
                    answer = json.loads(line[len(MARK) :])
                    if "error" in answer:
                        raise RuntimeError(answer["error"])
                    return answer["value"]
        except BrokenPipeError:
            pass
        self.process.wait(timeout=30)
        self.log.seek(0)
        last = [line.strip() for line in self.log.read().splitlines() if line.strip()][-1:]
        raise RuntimeError(f"its process ended with code {self.process.returncode}: {' '.join(last)}")

    def images(self, _entry: Entry) -> torch.Tensor:
        """All images, (N, 3, H, W) in 0..1."""
        path = self.folder / "images.npy"
        self.ask({"do": "images", "to": str(path)})
        return torch.from_numpy(np.load(path, allow_pickle=False))

    def seconds(self, _entry: Entry) -> float:
        """Of one image."""
        return float(self.ask({"do": "seconds"}))

    def facts(self, _entry: Entry) -> Facts:
        """See `Runner.facts`."""
        return self.ask({"do": "facts"})

    def close(self) -> None:
        """End the process and remove its files."""
        self.process.kill()  # it has nothing to tidy up, for which it would need seconds
        with contextlib.suppress(OSError):
            self.process.communicate()
        self._open.close()


# ---------------------------------------------------------------------- the other end
def _lines() -> Iterator[str]:
    """What is asked, line by line. When nobody can ask any more, this process ends, also in the middle of its work."""
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            asked.put(line)
        os._exit(1)

    threading.Thread(target=read, daemon=True, name="asked").start()
    while True:
        yield asked.get()


def serve() -> None:
    """Answer one `Isolated`."""
    out = sys.stdout
    sys.stdout = sys.stderr  # whatever a package prints
    runner, entry = None, Entry("baseline")
    for line in _lines():
        command = json.loads(line)
        try:
            value: Any = None
            if "job" in command:
                given = command["job"]
                job = Job(**given | {"prompts": tuple(given["prompts"])})
                entry = Entry(**command["entry"])
                runner = Runner(job)
                runner.switch_on(entry)
            assert runner is not None
            if command.get("do") == "images":
                np.save(command["to"], runner.images(entry).numpy())
            elif command.get("do"):
                value = getattr(runner, command["do"])(entry)
            answer = {"value": value}
        except Exception as error:
            text = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {text[0] if text else 'no message'}"}
        print(MARK + json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    serve()
