"""Runs one accelerator that patches things in a process of its own, which is told what to do in JSON lines.

The process is started as a program (`python -m diffusion_accel.bench.worker`) and not by `multiprocessing`, whose new
processes import the caller's main program: a notebook or a script of a few lines can call `benchmark` as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffusion_accel import interrupts
from diffusion_accel.conditioning import call_parameters, own_arguments
from diffusion_accel.model_files.names import find_model

from .entries import Entry
from .lines import MARK, serve
from .older_names import with_older_names
from .peers import PEERS, command_of
from .runner import Facts, Job, Runner

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class WithChildren(subprocess.Popen[str]):
    """A program that ends with whatever it started, such as workers that compile: they would keep its pipes open."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, start_new_session=True, **kwargs)

    def kill(self) -> None:
        """End it and its children at once."""
        if self.poll() is None and hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        super().kill()


class Isolated:
    """A `Runner` for one peer in its own process. Raises `RuntimeError` with the reason if that one fails."""

    def __init__(self, job: Job, entry: Entry, pipe: DiffusionPipeline) -> None:
        self._open = contextlib.ExitStack()
        self.folder = self._open.enter_context(interrupts.temporary_folder())
        self.log = self._open.enter_context((self.folder / "log").open("w+"))
        self.process = WithChildren(
            command_of(entry.kind), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self._open.enter_context(interrupts.helper(self.process))
        try:
            self.ask(_own_terms(job, entry, pipe, self.folder) if PEERS[entry.kind].apart else _told(job, entry))
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


def _told(job: Job, entry: Entry) -> dict[str, Any]:
    """What a process that has this package is told at first."""
    return {"job": asdict(job), "entry": asdict(entry)}


def _own_terms(job: Job, entry: Entry, pipe: DiffusionPipeline, folder: Path) -> dict[str, Any]:
    """The same for one that has not: where the model is, its scheduler, and arguments as the pipeline takes them."""
    (model := folder / "model").mkdir()
    source = find_model(job.model, job.allow_pickle)
    if source.kind == "file":
        raise RuntimeError(f"{entry.kind} takes the folder of a pipeline; convert {job.model} with save_pretrained")
    known = call_parameters(pipe)
    given = own_arguments(pipe, {k: v for k, v in job.options.items() if k in known and v is not None})
    scheduler = [type(pipe.scheduler).__name__, json.loads(pipe.scheduler.to_json_string())]
    told = {"folder": with_older_names(source.location, model), "scheduler": scheduler, "settings": entry.peer_settings}
    return {"job": {**asdict(job), "options": given}, **told}


# ---------------------------------------------------------------------- the other end
class Worker:
    """What answers an `Isolated` in this package's own environment."""

    runner: Runner
    entry: Entry

    def __call__(self, command: dict[str, Any]) -> Any:
        """Load the model and switch the peer on, or do with it what is asked."""
        if "job" in command:
            given = command["job"]
            self.entry = Entry(**command["entry"])
            self.runner = Runner(Job(**given | {"prompts": tuple(given["prompts"])}))
            self.runner.switch_on(self.entry)
        elif command["do"] == "images":
            np.save(command["to"], self.runner.images(self.entry).numpy())
        else:
            return getattr(self.runner, command["do"])(self.entry)
        return None


if __name__ == "__main__":
    serve(Worker())
