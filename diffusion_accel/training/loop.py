"""The training loop that every stage shares: accelerate, AdamW, averaged weights, logs, and exact resuming.

Everything random in a step is a function of (seed, step): each step makes its own generator, draws the data of the
*whole* batch from it on every process, and each process and micro-batch takes its slice. So a run that was interrupted
and resumed gives the same losses as one that was not, and the number of processes or micro-batches changes a result
only by rounding. The learning rate is a function of the step and of the budget in steps, never of the clock.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from diffusion_accel import interrupts

from .files import RunExistsError, TrainingError, UsageError
from .log import Log
from .settings import Outcome, Settings
from .state import STATE, load_state, read_counters, save_state
from .task import Batch, Task
from .update import Update

__all__ = ["Batch", "Outcome", "RunExistsError", "Settings", "Task", "averaged", "train"]


@contextmanager
def averaged(parameters: list[nn.Parameter], average: list[torch.Tensor]) -> Iterator[None]:
    """Within this context the parameters hold their averages."""
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter, value in zip(parameters, average, strict=True):
            parameter.data.copy_(value)
        yield
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)


def train(task: Task, folder: Path, settings: Settings, accelerator: Accelerator, resume: bool = False) -> Outcome:
    """Train `task` up to `settings.steps`; state, log.jsonl and previews go to `folder`.

    Raises:
        RunExistsError: there is a state and `resume` is false.
        UsageError: the batch cannot be divided, or the state was made with another seed or batch.
        TrainingError: a loss or a gradient is not finite; the last state saved stays.
    """
    parts = settings.accumulation * accelerator.num_processes
    if settings.batch % parts:
        raise UsageError(f"the batch of {settings.batch} cannot be divided by {parts} (processes x accumulation)")
    exists = (folder / STATE).exists()
    if exists and not resume:
        raise RunExistsError(f"{folder} holds a run at step {read_counters(folder)['step']}, which can be resumed")
    if exists:
        _check_facts(folder, getattr(task, "facts", {}))
    if exists and read_counters(folder)["step"] >= settings.steps:
        return Outcome(read_counters(folder)["step"], True)
    run = _Run(task, folder, settings, accelerator, exists)
    with interrupts.explaining(lambda: _how_to_go_on(folder)), interrupts.postponed() as signals:
        run.go(lambda: signals.received is not None)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    step = run.counters["step"]
    finished = step >= settings.steps
    return Outcome(step, finished, None if finished else signals.received)


class _Run:
    """One stretch of a run, from where a state left it or from the beginning.

    The averaged weights are written by hand: `diffusers.training_utils.EMAModel` copies the weights at its first step
    and rounds otherwise, so that runs that were begun before would not go on bit by bit.
    """

    def __init__(self, task: Task, folder: Path, settings: Settings, accelerator: Accelerator, exists: bool) -> None:
        self.task, self.folder, self.settings, self.accelerator = task, folder, settings, accelerator
        self.update = Update(task, settings, accelerator)
        self.average = [parameter.detach().clone() for parameter in self.update.parameters]
        self.counters: dict[str, Any] = {"step": 0, "seconds": 0.0, "loss_sum": 0.0, "loss_count": 0}
        fixed = {"seed": settings.seed, "batch": settings.batch}
        if exists:
            known = read_counters(folder)
            known |= {"optimizer": known.get("settings", {}).get("optimizer", "adamw")}
            here = fixed | {"optimizer": settings.optimizer}
            changed = [f"{key} {known.get(key)}" for key, value in here.items() if known.get(key) != value]
            if changed:
                raise UsageError(f"the run in {folder} was made with {', '.join(changed)}; resume it with the same")
            update = self.update
            self.counters |= load_state(folder, update.model, self.average, update.optimizer, update.weighting)
        self.counters |= fixed | {"settings": asdict(settings)} | getattr(task, "facts", {})
        self.update.prepare()
        self.log = Log(folder, self.counters["step"], settings.batch) if accelerator.is_main_process else None
        self.started, self.before = time.monotonic(), self.counters["seconds"]

    @property
    def seconds(self) -> float:
        """Of training, over all stretches."""
        return float(self.before + time.monotonic() - self.started)

    def go(self, stopped: Callable[[], bool]) -> None:
        """Train until the budget is used up, `stopped()` or the minutes are over; the state is saved at the end."""
        settings, counters, main = self.settings, self.counters, self.log is not None
        steps = {"total": settings.steps, "initial": counters["step"]}
        saved = self.started
        with tqdm(**steps, desc=self.folder.name, unit="step", disable=not main or None) as bar:
            while counters["step"] < settings.steps:
                mean = self.update.step(counters["step"])
                self._check(mean)
                self._average(counters["step"])
                counters["step"] += 1
                counters["loss_sum"] += mean
                counters["loss_count"] += 1
                bar.update()
                self._watch(bar)
                if time.monotonic() - saved >= settings.save_every:
                    self._save()
                    saved = time.monotonic()
                late = settings.minutes is not None and time.monotonic() - self.started >= 60 * settings.minutes
                if _agree(self.accelerator, stopped() or late):
                    break
            self._save()
        if self.log is not None:
            self.log.close()

    def _check(self, loss: float) -> None:
        """Raise `TrainingError` where numbers ran away: what such a step leaves is neither averaged nor saved."""
        broken = [] if math.isfinite(loss) else [f"a loss of {loss}"]
        norm, skips = float(self.update.norm), self.accelerator.scaler is not None  # steps, as is usual in float16
        if not skips and not math.isfinite(norm):
            broken.append(f"a gradient norm of {norm}")
        if broken:
            raise self._ran_away(" and ".join(broken), self.counters["step"] + 1)

    def _ran_away(self, what: str, step: int) -> TrainingError:
        return TrainingError(
            f"{self.folder.name}: {what} at step {step}; {_how_to_go_on(self.folder)}. "
            "Train with a lower learning rate, in float32, or without compiling"
        )

    def _average(self, step: int) -> None:
        """Move the averaged weights; only the main process has them."""
        if self.log is not None:
            decay = min(self.settings.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.update.parameters], 1 - decay)

    def _save(self) -> None:
        if self.log is not None:
            if not all(bool(torch.isfinite(values).all()) for values in self.average):
                raise self._ran_away("weights that are no numbers", self.counters["step"])
            self.counters["seconds"] = self.seconds
            update = self.update
            save_state(self.folder, update.model, self.average, update.optimizer, self.counters, update.weighting)

    def _watch(self, bar: tqdm) -> None:
        """Log, evaluate and draw where it is time to; on the main process."""
        if self.log is None:
            return
        settings, counters = self.settings, self.counters
        step = counters["step"]
        last = step == settings.steps
        values: dict[str, Any] = {}
        if last or (settings.log_every and step % settings.log_every == 0):
            values["loss"] = counters["loss_sum"] / counters["loss_count"]
            values |= {"lr": settings.rate(step - 1), "gradient_norm": float(self.update.norm)}
            counters |= {"loss_sum": 0.0, "loss_count": 0}
            bar.set_postfix(loss=f"{values['loss']:.4f}")
        if last or (settings.eval_every and step % settings.eval_every == 0):
            with self._averaged():
                values |= self.task.evaluate()
        if values:
            self.log.write(step, self.seconds, values)
        if settings.grid_every and (last or step % settings.grid_every == 0):
            with self._averaged():
                self.task.preview(self.folder / f"grid-{step:06d}.png")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model as it would be exported now: averaged weights, no dropout."""
        with averaged(self.update.parameters, self.average), torch.no_grad():
            self.update.model.eval()
            yield
            self.update.model.train()


def _check_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Raise `UsageError` if a run was made with other facts than the task that goes on with it has."""
    known = read_counters(folder)
    for key, value in json.loads(json.dumps(facts)).items():
        if known.get(key) != value:
            raise UsageError(
                f"the run in {folder} was made with {key.replace('_', ' ')} {known.get(key)}, not {value}; go on with "
                "the same, or begin anew in an empty folder"
            )


def _how_to_go_on(folder: Path) -> str:
    if not (folder / STATE).exists():
        return "no state was saved"
    return f"the state of step {read_counters(folder)['step']} is saved, and the run can be resumed from there"


def _agree(accelerator: Accelerator, stop: bool) -> bool:
    """Whether any process wants to stop; every process gets the same answer."""
    if accelerator.num_processes == 1:
        return stop
    if stop:
        accelerator.set_trigger()
    return accelerator.check_trigger()
