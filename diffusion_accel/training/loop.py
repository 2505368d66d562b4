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
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from diffusion_accel import interrupts
from diffusion_accel.io import split_lines

from .files import UsageError, write_json_lines
from .multitask import Weighting
from .state import STATE, load_state, read_counters, save_state

Batch = dict[str, torch.Tensor]


class Task(Protocol):
    """What a stage adds to the loop. `model` holds the weights that are trained; all its parameters take part."""

    model: nn.Module

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """The data of one step: tensors whose first dimension is `size`, everything random taken from `rng`."""

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Mean loss over a slice of a batch; `model` is the (possibly wrapped) model to call.

        A task with a `weighting` (see `multitask`) returns one loss a task cluster, (k,). A task with `facts` has them
        in its saved state.
        """

    def evaluate(self) -> dict[str, Any]:
        """Numbers for the log, from `self.model` as it is (the loop has put the averaged weights in)."""

    def preview(self, path: Path) -> None:
        """Write an image that shows how far training is."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one run of the loop.

    Attributes:
        steps: budget in optimizer steps; the learning-rate schedule ends there.
        batch: samples per optimizer step, over all processes and micro-batches together.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up.
        cooldown: share of the budget at the end in which the rate falls to 0.
        curve: "linear" or "cosine", how it falls.
        cycles: how often warm-up and fall are gone through within the budget (warm restarts).
        beta2, weight_decay: of AdamW; beta1 is 0.9.
        clip: largest gradient norm.
        ema: decay of the averaged weights (an exponential moving average, as in Ho et al. 2020, appendix B), with the
            warm-up min(ema, (1 + step) / (10 + step)).
        seed: of data order, noise and timesteps.
        save_every: seconds between saved states.
        log_every, eval_every, grid_every: steps between log lines, evaluations and previews; 0 switches off.
        minutes: stop after so long, with the state saved; does not change the schedule. None: no limit.
        accumulation: micro-batches per step.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    cooldown: float = 0.4
    curve: str = "linear"
    cycles: int = 1
    beta2: float = 0.99
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.998
    seed: int = 0
    save_every: float = 240.0
    log_every: int = 50
    eval_every: int = 250
    grid_every: int = 500
    minutes: float | None = None
    accumulation: int = 1

    def rate(self, step: int) -> float:
        """Learning rate of step `step` (from 0)."""
        length = self.steps / self.cycles
        place = step - length * min(self.cycles - 1, int(step / length))
        left = (length - place) / max(1.0, self.cooldown * length)
        fall = min(1.0, left)
        if self.curve == "cosine":
            fall = 0.5 * (1 - math.cos(math.pi * fall))
        return self.lr * min(1.0, (place + 1) / max(1, self.warmup)) * fall


@dataclass(frozen=True)
class Outcome:
    """Where a run stopped: after `step` steps, `finished` if that is the budget, `signal` if one stopped it."""

    step: int
    finished: bool
    signal: int | None = None


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


def _attention(accelerator: Accelerator) -> AbstractContextManager[None]:
    """The attention kernel to train with: in bfloat16 on a CPU the plain one.

    The backward pass of the flash kernel is slow there (sticker UNet, one core with AMX: 60 against 83 samples/s).
    """
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _slices(batch: Batch, accelerator: Accelerator, accumulation: int) -> Iterator[Batch]:
    """This process's micro-batches of a global batch."""
    parts, rank = accumulation * accelerator.num_processes, accelerator.process_index
    size = len(next(iter(batch.values()))) // parts
    for micro in range(accumulation):
        start = (micro * accelerator.num_processes + rank) * size
        yield {key: value[start : start + size].to(accelerator.device) for key, value in batch.items()}


def _gradients(losses: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
    """Flat gradients of each of the losses (k,): (k, P)."""
    rows = []
    for i, loss in enumerate(losses):
        found = torch.autograd.grad(loss, parameters, retain_graph=i + 1 < len(losses), allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs]))
    return torch.stack(rows)


def _set_gradient(parameters: list[nn.Parameter], flat: torch.Tensor) -> None:
    parts = flat.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(part.view(parameter.shape))


def train(task: Task, folder: Path, settings: Settings, accelerator: Accelerator, resume: bool = False) -> Outcome:
    """Train `task` up to `settings.steps`; state, log.jsonl and previews go to `folder`.

    Raises:
        UsageError: there is a state and `resume` is false, the batch cannot be divided, or the state was made with
            another seed or batch.
    """
    parts = settings.accumulation * accelerator.num_processes
    if settings.batch % parts:
        raise UsageError(f"the batch of {settings.batch} cannot be divided by {parts} (processes x accumulation)")
    exists = (folder / STATE).exists()
    if exists and not resume:
        raise UsageError(f"{folder} holds a run at step {read_counters(folder)['step']}; pass --resume or --overwrite")
    if exists:
        _check_facts(folder, getattr(task, "facts", {}))
    if exists and read_counters(folder)["step"] >= settings.steps:
        return Outcome(read_counters(folder)["step"], True)

    model = task.model.to(accelerator.device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    average = [parameter.detach().clone() for parameter in parameters]
    weighting: Weighting = getattr(task, "weighting", None) or Weighting()
    weighting.to(accelerator.device)
    if weighting.on_gradients and accelerator.mixed_precision == "fp16":
        raise UsageError("task losses that combine gradients do not work with fp16 loss scaling; use bf16 or no")
    fused = accelerator.device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW(
        parameters, lr=settings.lr, betas=(0.9, settings.beta2), weight_decay=settings.weight_decay, fused=fused
    )
    if extra := list(weighting.parameters()):
        adamw.add_param_group({"params": extra, "lr": weighting.lr, "weight_decay": 0.0})
    counters: dict[str, Any] = {"step": 0, "seconds": 0.0, "loss_sum": 0.0, "loss_count": 0}
    fixed = {"seed": settings.seed, "batch": settings.batch}
    if exists:
        counters |= load_state(folder, model, average, adamw, weighting)
        changed = [f"{key} {counters[key]}" for key, value in fixed.items() if counters[key] != value]
        if changed:
            raise UsageError(f"the run in {folder} was made with {', '.join(changed)}; resume it with the same")
    counters |= fixed | {"settings": asdict(settings)} | getattr(task, "facts", {})
    accelerator.gradient_accumulation_steps = settings.accumulation
    wrapped, optimizer = accelerator.prepare(model, adamw)

    main = accelerator.is_main_process
    log_path = folder / "log.jsonl"
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        lines = _log_lines(log_path) if exists and log_path.exists() else []
        write_json_lines(log_path, [line for line in lines if line["step"] <= counters["step"]])

    board = _tensorboard(folder) if main else None
    start = saved = time.monotonic()
    before, norm = counters["seconds"], torch.zeros(())
    bar = tqdm(total=settings.steps, initial=counters["step"], desc=folder.name, unit="step", disable=not main or None)

    def save() -> None:
        if main:
            counters["seconds"] = before + time.monotonic() - start
            save_state(folder, model, average, adamw, counters, weighting)

    def log(**values: Any) -> None:
        step = counters["step"]
        seconds = before + time.monotonic() - start
        head = {"step": step, "samples": step * settings.batch, "seconds": round(seconds, 2)}
        with log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(head | values) + "\n")
        if board is not None:
            for name, value in _scalars(values):
                board.add_scalar(name, value, step)

    with interrupts.explaining(lambda: _how_to_go_on(folder)), interrupts.postponed() as signals, bar:
        while counters["step"] < settings.steps:
            step = counters["step"]
            rng = np.random.default_rng([settings.seed, step])
            torch.manual_seed(int(rng.integers(2**62)))  # for dropout inside a model
            adamw.param_groups[0]["lr"] = settings.rate(step)
            losses, pool = [], None
            for part in _slices(task.draw(rng, settings.batch), accelerator, settings.accumulation):
                if weighting.on_gradients:
                    with accelerator.no_sync(wrapped):
                        with accelerator.autocast(), _attention(accelerator):
                            each = task.loss(wrapped, part)
                        rows = _gradients(each / settings.accumulation, parameters)
                    pool = rows if pool is None else pool + rows
                    losses.append(each.detach().float().mean())
                    continue
                with accelerator.accumulate(wrapped):
                    with accelerator.autocast(), _attention(accelerator):
                        each = task.loss(wrapped, part)
                        loss = weighting.total(each)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        for parameter in extra:
                            parameter.grad = accelerator.reduce(parameter.grad, "mean")
                        norm = accelerator.clip_grad_norm_(parameters, settings.clip)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(each.detach().float().mean())
            if pool is not None:
                _set_gradient(parameters, weighting.combine(accelerator.reduce(pool, "mean"), rng, step))
                norm = accelerator.clip_grad_norm_(parameters, settings.clip)
                adamw.step()
                adamw.zero_grad()
            mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            if main:
                decay = min(settings.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
            step = counters["step"] = step + 1
            counters["loss_sum"] += mean
            counters["loss_count"] += 1
            bar.update()
            if main:
                last = step == settings.steps
                values: dict[str, Any] = {}
                if last or (settings.log_every and step % settings.log_every == 0):
                    values["loss"] = counters["loss_sum"] / counters["loss_count"]
                    values |= {"lr": settings.rate(step - 1), "gradient_norm": float(norm)}
                    counters |= {"loss_sum": 0.0, "loss_count": 0}
                    bar.set_postfix(loss=f"{values['loss']:.4f}")
                if last or (settings.eval_every and step % settings.eval_every == 0):
                    with averaged(parameters, average), torch.no_grad():
                        model.eval()
                        values |= task.evaluate()
                        model.train()
                if values:
                    log(**values)
                if settings.grid_every and (last or step % settings.grid_every == 0):
                    with averaged(parameters, average), torch.no_grad():
                        model.eval()
                        task.preview(folder / f"grid-{step:06d}.png")
                        model.train()
            if time.monotonic() - saved >= settings.save_every:
                save()
                saved = time.monotonic()
            late = settings.minutes is not None and time.monotonic() - start >= 60 * settings.minutes
            if _agree(accelerator, signals.received is not None or late):
                break
        save()
    if board is not None:
        board.close()
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    finished = counters["step"] >= settings.steps
    return Outcome(counters["step"], finished, None if finished else signals.received)


def _check_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Raise `UsageError` if a run was made with other facts than the task that goes on with it has."""
    known = read_counters(folder)
    for key, value in json.loads(json.dumps(facts)).items():
        if known.get(key) != value:
            raise UsageError(
                f"the run in {folder} was made with {key.replace('_', ' ')} {known.get(key)}, not {value}; go on with "
                "the same, or start again with --overwrite"
            )


def _log_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log: a run that was killed may have left half of one."""
    found = []
    for line in split_lines(path.read_text(encoding="utf-8", errors="replace")):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and type(values.get("step")) is int:
            found.append(values)
    return found


def _tensorboard(folder: Path) -> Any:
    """A TensorBoard writer, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def _scalars(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from ((f"{prefix}{name}/{i}", float(item)) for i, item in enumerate(value))
        else:
            yield prefix + name, float(value)


def _how_to_go_on(folder: Path) -> str:
    if not (folder / STATE).exists():
        return "no state was saved"
    return f"the state of step {read_counters(folder)['step']} is saved; --resume goes on from there"


def _agree(accelerator: Accelerator, stop: bool) -> bool:
    """Whether any process wants to stop; every process gets the same answer."""
    if accelerator.num_processes == 1:
        return stop
    if stop:
        accelerator.set_trigger()
    return accelerator.check_trigger()
