"""Runs one process's share of a model without the other processes, and notes what it does.

The hooks are those of real runs, and so are the rows, messages and buffers; only the messages go nowhere. On the meta
device nothing is computed either, so that models and images of any size can be recorded on any machine.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from diffusion_accel.denoisers import entry_layer, halvings
from diffusion_accel.hooks import HookSet
from diffusion_accel.parallel.communicator import Batch, Communicator
from diffusion_accel.parallel.geometry import plan_split
from diffusion_accel.parallel.group import World
from diffusion_accel.parallel.model_hooks import DenoiserHook, install_layers, install_vae
from diffusion_accel.parallel.patch_parallel import PatchParallel
from diffusion_accel.parallel.run import PatchRun

from .operations import Event, Operation, Recorder, Sent, Waited


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
    run = PatchRun(world, clock, communicator, settings.mode, 1, settings.neighbour_fraction, settings.group_norm)
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
            clock.index = index
            before: Counter[tuple[str, str]] = Counter(communicator.traffic)
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


def _nobody_to_ask(*_: object) -> None:
    """In place of the agreement among processes."""


def _faster(a: Recording, b: Recording) -> Recording:
    def merged(x: list[Event], y: list[Event]) -> list[Event]:
        pairs = zip(x, y, strict=True)
        return [q if isinstance(q, Operation) and (q.seconds or 0) < (p.seconds or 0) else p for p, q in pairs]  # type: ignore[union-attr]

    steps = [merged(x, y) for x, y in zip(a.steps, b.steps, strict=True)]
    return replace(a, steps=steps, decoding=merged(a.decoding, b.decoding))
