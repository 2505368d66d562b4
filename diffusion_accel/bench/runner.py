"""Runs entries on one loaded pipeline: in this process, or, for accelerators that patch things, in one of its own.

`python -m diffusion_accel.bench.runner` reads a job and commands as JSON lines and answers with JSON lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusion_accel import interrupts
from diffusion_accel.conditioning import PROMPT, condition_of, usual_texts
from diffusion_accel.errors import ConfigurationError

from .entries import Entry

MARK = "@bench "


@dataclass(frozen=True)
class Job:
    """What every entry does: the images of these prompts.

    Attributes:
        model: embedded name, folder, file or hub id.
        steps, scheduler: of the baseline; None: the scheduler that an embedded model recommends, else the model's own.
        options: further arguments of the pipeline.
        allow_pickle: also load weights that are pickles.
        threads: CPU threads.
    """

    model: str
    prompts: tuple[str, ...]
    steps: int
    scheduler: str | None = None
    seed: int = 0
    batch: int = 8
    device: str = "cpu"
    dtype: str = "float32"
    allow_pickle: bool = False
    threads: int = 1
    options: dict[str, Any] = field(default_factory=dict)


class Runner:
    """One loaded pipeline."""

    def __init__(self, job: Job) -> None:
        import diffusers
        import torch
        import transformers

        from diffusion_accel.measure.sampler import Sampler
        from diffusion_accel.model_files.names import find_model
        from diffusion_accel.pipelines.loading import load_pipeline
        from diffusion_accel.pipelines.schedulers import set_scheduler

        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
        torch.set_num_threads(job.threads)
        self.pipe = load_pipeline(job.model, dtype=getattr(torch, job.dtype), allow_pickle=job.allow_pickle)
        self.pipe = self.pipe.to(job.device)
        if not any(job.prompts):
            if condition_of(self.pipe) == PROMPT:
                raise ConfigurationError("prompts are needed (--prompts-file): fidelity depends on what is drawn")
            job = replace(job, prompts=tuple(usual_texts(self.pipe, len(job.prompts))))
        self.scheduler = job.scheduler or find_model(job.model, job.allow_pickle).defaults.get("scheduler", "")
        if self.scheduler:
            set_scheduler(self.pipe, self.scheduler)
        self.pipe.set_progress_bar_config(disable=True)
        self.job = job
        self.sampler = Sampler(self.pipe, job.prompts, job.steps, job.seed, job.batch, job.options)

    def check(self, entry: Entry) -> None:
        """Raise `ConfigurationError` if an entry cannot work on this pipeline, before anything is measured. What a peer
        needs only its own process knows."""
        from diffusion_accel.pipelines.schedulers import set_scheduler
        from diffusion_accel.switchboard import why_not

        reason = None if entry.is_peer else entry.refusal(self.job.steps, self.scheduler)
        if entry.kind == "fewer-steps" and (name := entry.fewer_steps()[1]):
            before = self.pipe.scheduler
            set_scheduler(self.pipe, name)
            self.pipe.scheduler = before
        elif not entry.is_peer and entry.kind not in ("baseline", "fewer-steps"):
            reason = reason or why_not(entry.feature, self.pipe)
        if reason:
            raise ConfigurationError(f"the entry {entry.name} cannot work on {type(self.pipe).__name__}: {reason}")

    @contextlib.contextmanager
    def active(self, entry: Entry, seed: int | None = None, sampler: Any = None) -> Iterator[Any]:
        """A sampler with the entry switched on."""
        import torch

        from diffusion_accel.pipelines.schedulers import set_scheduler
        from diffusion_accel.switchboard import accelerate

        sampler = self.sampler if sampler is None else sampler
        if seed is not None:
            sampler = replace(sampler, seed=seed)
        scheduler, handle = self.pipe.scheduler, getattr(self.pipe, "acceleration", None)
        try:
            if entry.kind == "fewer-steps":
                steps, name = entry.fewer_steps()
                sampler = replace(sampler, steps=steps)
                if name:
                    set_scheduler(self.pipe, name)
            elif entry.kind != "baseline":
                accelerate(self.pipe, entry.feature)
            with torch.inference_mode():
                yield sampler
        finally:
            self.pipe.scheduler = scheduler
            if handle is None and getattr(self.pipe, "acceleration", None) is not None:
                self.pipe.acceleration.remove()

    def images(self, entry: Entry, seed: int | None = None) -> Any:
        """All images, (N, 3, H, W) in 0..1."""
        with self.active(entry, seed) as sampler:
            return sampler.images()

    def seconds(self, entry: Entry) -> float:
        """Of one image."""
        from diffusion_accel.measure.timing import seconds_of

        with self.active(entry, sampler=self.sampler.part(0, 1)) as sampler:
            return seconds_of(sampler.images, self.job.device)

    def facts(self, entry: Entry) -> dict[str, float]:
        """FLOPs of one image's call, and the peak memory in MiB while it runs (None where it cannot be measured)."""
        from diffusion_accel.flops import count_flops

        with self.active(entry, sampler=self.sampler.part(0, 1)) as sampler:
            with count_flops() as count:
                sampler.images()
            reset_peak(self.job.device)
            sampler.images()
            return {"flops": count.total, "peak_mib": peak_mib(self.job.device)}


class Isolated:
    """A `Runner` for one peer in its own process. Raises `RuntimeError` with the reason if that one fails."""

    def __init__(self, job: Job, entry: Entry) -> None:
        self._open = contextlib.ExitStack()
        self.folder = self._open.enter_context(interrupts.temporary_folder())
        self.log = self._open.enter_context((self.folder / "log").open("w+"))
        command = [sys.executable, "-m", "diffusion_accel.bench.runner"]
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

    def images(self, entry: Entry, seed: int | None = None) -> Any:
        import numpy as np
        import torch

        path = self.folder / "images.npy"
        self.ask({"do": "images", "to": str(path)})
        return torch.from_numpy(np.load(path, allow_pickle=False))

    def seconds(self, entry: Entry) -> float:
        return float(self.ask({"do": "seconds"}))

    def facts(self, entry: Entry) -> dict[str, float]:
        return dict(self.ask({"do": "facts"}))

    def close(self) -> None:
        self.process.kill()  # it has nothing to tidy up, for which it would need seconds
        with contextlib.suppress(OSError):
            self.process.communicate()
        self._open.close()


# ---------------------------------------------------------------------- memory
def reset_peak(device: str) -> None:
    """Begin a new measurement of the highest memory use."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: str) -> float:
    """The highest memory use since `reset_peak`: the device's, or the process's resident memory."""
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.max_memory_allocated() / 2**20)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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
    import numpy as np

    from .peers import apply_peer

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
                peer = Entry(**command["entry"])
                runner = Runner(job)
                call = apply_peer(peer.kind, peer.numbers(), runner.pipe, job.steps)
                runner.sampler = replace(runner.sampler, caller=call)
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
