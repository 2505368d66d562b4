"""One step of the optimizer: the losses of a batch, their gradients, and the update of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .files import UsageError
from .multitask import Weighting
from .optimizers import make_optimizer
from .settings import Settings
from .task import Batch, Task


class Update:
    """Steps on the weights of a task, in micro-batches, in one process or several.

    Attributes:
        model: of the task, on its device, in training mode.
        parameters: those of the model that are trained.
        weighting: how the losses of task clusters become one update; it may have parameters of its own.
        optimizer: of both.
        norm: of the gradient of the last step.
    """

    def __init__(self, task: Task, settings: Settings, accelerator: Accelerator) -> None:
        self.task, self.settings, self.accelerator = task, settings, accelerator
        self.model = task.model.to(accelerator.device).train()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.weighting: Weighting = getattr(task, "weighting", None) or Weighting()
        self.weighting.to(accelerator.device)
        if self.weighting.on_gradients and accelerator.mixed_precision == "fp16":
            raise UsageError("task losses that combine gradients do not work with fp16 loss scaling; use bf16 or no")
        self.optimizer = make_optimizer(self.model, settings)
        self._own_groups = len(self.optimizer.param_groups)
        self._extra = list(self.weighting.parameters())
        if self._extra:
            self.optimizer.add_param_group({"params": self._extra, "lr": self.weighting.lr, "weight_decay": 0.0})
        self.norm = torch.zeros(())

    def prepare(self) -> None:
        """Hand model and optimizer to accelerate, once a state is loaded into them."""
        self.accelerator.gradient_accumulation_steps = self.settings.accumulation
        self._wrapped, self._optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def step(self, step: int) -> float:
        """Do step `step` (from 0); the mean loss over all processes."""
        settings, accelerator = self.settings, self.accelerator
        rng = np.random.default_rng([settings.seed, step])
        torch.manual_seed(int(rng.integers(2**62)))  # for dropout inside a model
        for group in self.optimizer.param_groups[: self._own_groups]:
            group["lr"] = settings.rate(step)
        parts = _slices(self.task.draw(rng, settings.batch), accelerator, settings.accumulation)
        if self.weighting.on_gradients:
            losses = self._combined(parts, rng, step)
        else:
            losses = [self._accumulated(part) for part in parts]
        return float(accelerator.reduce(torch.stack(losses).mean(), "mean").item())

    def _accumulated(self, part: Batch) -> torch.Tensor:
        """The gradient of a micro-batch; behind the last one the weights are updated."""
        accelerator = self.accelerator
        with accelerator.accumulate(self._wrapped):
            with accelerator.autocast(), _attention(accelerator):
                each = self.task.loss(self._wrapped, part)
                loss = self.weighting.total(each)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                for parameter in self._extra:
                    parameter.grad = accelerator.reduce(parameter.grad, "mean")
                self.norm = accelerator.clip_grad_norm_(self.parameters, self.settings.clip)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return each.detach().float().mean()

    def _combined(self, parts: Iterator[Batch], rng: np.random.Generator, step: int) -> list[torch.Tensor]:
        """One update from the gradients of every task cluster."""
        accelerator, losses = self.accelerator, []
        pool: torch.Tensor | None = None
        for part in parts:
            with accelerator.no_sync(self._wrapped):
                with accelerator.autocast(), _attention(accelerator):
                    each = self.task.loss(self._wrapped, part)
                rows = _gradients(each / self.settings.accumulation, self.parameters)
            pool = rows if pool is None else pool + rows
            losses.append(each.detach().float().mean())
        _set_gradient(self.parameters, self.weighting.combine(accelerator.reduce(pool, "mean"), rng, step))
        self.norm = accelerator.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses


def _attention(accelerator: Accelerator) -> AbstractContextManager[None]:
    """The attention kernel to train with: in bfloat16 on a CPU the plain one, on CUDA any but cuDNN's.

    The backward pass of the flash kernel is slow on a CPU (sticker UNet, one core with AMX: 60 against 83 samples/s).
    That of cuDNN fails for some shapes (heads of 32 channels, torch 2.11, H100).
    """
    if accelerator.device.type == "cuda":
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
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
