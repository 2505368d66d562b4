"""Runs one process's share of a model without the other processes, and notes what it does.

The hooks are those of real runs, and so are the rows, messages and buffers; only the messages go nowhere. On the meta
device nothing is computed either, so that models and images of any size can be recorded on any machine.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from diffusion_accel.denoisers import entry_layer, halvings
from diffusion_accel.hooks import HookSet, tensors_in
from diffusion_accel.parallel.communicator import Batch, Communicator
from diffusion_accel.parallel.geometry import plan_split
from diffusion_accel.parallel.group import World
from diffusion_accel.parallel.model_hooks import DenoiserHook, install_layers, install_vae
from diffusion_accel.parallel.patch_parallel import PatchParallel
from diffusion_accel.parallel.run import PatchRun

_ALLOCATES = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh")


@dataclass(frozen=True)
class Operation:
    """One operation of torch.

    Attributes:
        layer: the innermost layer that it belongs to.
        flops: floating-point operations, 2 for a multiply-add; 0 where only memory counts.
        bytes: read and written.
        itemsize: bytes of a value, which says how fast a machine multiplies.
        seconds: that it took here; None on the meta device.
    """

    layer: str
    flops: float
    bytes: int
    itemsize: int
    seconds: float | None


@dataclass(frozen=True)
class Sent:
    """Messages that left together, and those that are expected with them; `Waited` says when they are needed."""

    number: int
    sent: int
    received: int


@dataclass(frozen=True)
class Waited:
    """The messages `number` are needed here."""

    number: int


Event = Operation | Sent | Waited


class Recorder(TorchDispatchMode):
    """Notes the operations that run inside it; views and allocations are none."""

    def __init__(self, names: dict[int, str], timed: bool) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.timed = timed
        self._names, self._layers = names, [""]
        self._paused = False
        self._attention = _Attention(self)

    @contextmanager
    def into(self, events: list[Event]) -> Iterator[None]:
        """Note what runs inside in a list."""
        self.events = events
        with self:
            yield

    def __enter__(self) -> Any:
        def enter(module: nn.Module, _: Any) -> None:
            self._layers.append(self._names.get(id(module), self._layers[-1]))

        def leave(module: nn.Module, *_: Any) -> None:
            self._layers.pop()

        self._handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is not noted."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        began = time.perf_counter()
        output = func(*args, **kwargs)
        seconds = time.perf_counter() - began
        if self._paused or not _moves_data(func):
            return output
        count = flop_registry.get(func.overloadpacket)
        flops = float(count(*args, **kwargs, out_val=output)) if count is not None else 0.0
        self.note([*tensors_in((args, kwargs)), *tensors_in(output)], flops, seconds)
        return output

    def note(self, tensors: list[torch.Tensor], flops: float, seconds: float) -> None:
        """Add an operation that reads and writes `tensors`."""
        size = sum(t.numel() * t.element_size() for t in tensors)
        itemsize = max((t.element_size() for t in tensors if t.is_floating_point()), default=4)
        self.events.append(Operation(self._layers[-1], flops, size, itemsize, seconds if self.timed else None))


class _Attention(TorchFunctionMode):
    """Takes attention as one operation: how torch splits it up depends on the device."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (*args, *(kwargs[k] for k in ("query", "key", "value") if k in kwargs))[:3]
        with self.recorder.paused():
            began = time.perf_counter()
            if query.device.type == "meta":
                # laid out as the fused kernels do, heads inside positions
                output = query.new_empty(*query.shape[:-3], *query.shape[-2:-4:-1], value.shape[-1]).transpose(-2, -3)
            else:
                output = func(*args, **kwargs)
            seconds = time.perf_counter() - began
        shapes = (t.reshape(-1, 1, *t.shape[-2:]).shape for t in (query, key, value))
        self.recorder.note([query, key, value, output], float(sdpa_flop_count(*shapes)), seconds)
        return output


def _moves_data(func: Any) -> bool:
    if func.overloadpacket.__name__ in _ALLOCATES:
        return False
    return not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


class DryCommunicator(Communicator):
    """Messages that go nowhere: the others are taken to send zeros, at once."""

    def __init__(self, batch: int, recorder: Recorder) -> None:
        super().__init__(None, batch)
        self.recorder = recorder
        self._number = 0

    def _transfer(self, sends: dict[int, torch.Tensor], received: dict[int, torch.Tensor]) -> Batch:
        with self.recorder.paused():
            for tensor in received.values():
                tensor.zero_()
        self._number += 1
        out, back = (sum(t.numel() * t.element_size() for t in part.values()) for part in (sends, received))
        self.recorder.events.append(Sent(self._number, out, back))
        return Batch([self._number])

    def _wait(self, batch: Batch) -> None:
        works, batch.works = batch.works, []
        self.recorder.events += [Waited(number) for number in works]


@dataclass(frozen=True)
class Recording:
    """What one process does in an image.

    Attributes:
        steps: the events of an exact step, of the first that does not wait, and of a later one; only the first where
            all are exact.
        decoding: the events of the VAE's decoder.
        traffic: bytes sent at the last of `steps`, by (kind, layer).
        buffer_bytes: of the displaced messages' buffers.
    """

    steps: list[list[Event]]
    decoding: list[Event]
    traffic: dict[tuple[str, str], int]
    buffer_bytes: int


@dataclass(frozen=True)
class Subject:
    """What is run.

    Attributes:
        denoiser: a U-Net, on the meta device or on the one whose times are wanted.
        inputs: the arguments of one step.
        vae: an autoencoder; None to leave decoding out.
        latents: what its decoder is given.
    """

    denoiser: Any
    inputs: dict[str, Any]
    vae: Any = None
    latents: torch.Tensor | None = None

    @property
    def timed(self) -> bool:
        """Whether it really computes."""
        device: torch.device = next(self.denoiser.parameters()).device
        return device.type != "meta"


def record_busiest(subject: Subject, settings: PatchParallel, devices: int) -> list[Recording]:
    """`record` for the processes of a world that may be the slowest: the largest part at the image's border, and the
    largest in its middle.

    Where times are measured, each is recorded twice, and the shorter time of every operation counts.
    """
    parts = devices // (2 if settings.cfg_parallel and devices > 1 else 1)
    sample = subject.inputs["sample"]
    depth = halvings(subject.denoiser)
    height, width = sample.shape[-2:]
    splits = [plan_split(height, width, parts, part, depth) for part in range(parts)]
    rows = {part: split.levels[0].rows(part) if split is not None else 0 for part, split in enumerate(splits)}
    places = {0, parts - 1}, {*range(1, parts - 1)}
    worlds = [World(max(sorted(place), key=rows.__getitem__), devices) for place in places if place]
    first = [record(subject, settings, world) for world in worlds]
    if not subject.timed:
        return first
    second = [record(subject, settings, world) for world in worlds]
    return [_faster(a, b) for a, b in zip(first, second, strict=True)]


@torch.no_grad()
def record(subject: Subject, settings: PatchParallel, world: World) -> Recording:
    """Run the share of one process of a world.

    Args:
        settings: of the feature; `ranks` does not matter here, and one step is exact whatever `warmup` is.
        world: the size of the world and the process; its group is not used.
    """
    denoiser, vae = subject.denoiser, subject.vae
    models = {"denoiser": denoiser} | ({} if vae is None else {"vae": vae})
    names = {id(m): f"{part}.{name}" for part, model in models.items() for name, m in model.named_modules()}
    recorder = Recorder(names, subject.timed)
    communicator = DryCommunicator(settings.comm_checkpoint, recorder)
    clock = SimpleNamespace(index=0, call=0)
    run = PatchRun(world, clock, communicator, settings.mode, 1, settings.p, settings.group_norm)
    hooks = HookSet("diffusion_accel.plan")
    if world.size > 1:
        install_layers(hooks, run, denoiser, "denoiser", entry_layer(denoiser))
        hooks.add(denoiser, DenoiserHook(run, settings.cfg_parallel, _nobody_to_ask))
        if vae is not None and settings.vae:
            install_vae(hooks, run, vae, _nobody_to_ask)
    only_exact = settings.mode == "sync" or world.size == 1
    steps: list[list[Event]] = []
    decoding: list[Event] = []
    traffic: Counter[tuple[str, str]] = Counter()
    try:
        for index in range(1 if only_exact else 3):
            clock.index, before = index, Counter(communicator.traffic)
            steps.append([])
            with recorder.into(steps[-1]):
                denoiser(**subject.inputs)
            traffic = communicator.traffic - before
        if vae is not None:
            with recorder.into(decoding):
                vae.decode(subject.latents)
    finally:
        hooks.remove()
    return Recording(steps, decoding, dict(traffic), communicator.buffer_bytes)


def _nobody_to_ask(*_: Any) -> None:
    """In place of the agreement among processes."""


def _faster(a: Recording, b: Recording) -> Recording:
    def merged(x: list[Event], y: list[Event]) -> list[Event]:
        pairs = zip(x, y, strict=True)
        return [q if isinstance(q, Operation) and (q.seconds or 0) < (p.seconds or 0) else p for p, q in pairs]  # type: ignore[union-attr]

    steps = [merged(x, y) for x, y in zip(a.steps, b.steps, strict=True)]
    return replace(a, steps=steps, decoding=merged(a.decoding, b.decoding))
