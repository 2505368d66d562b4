"""How long an image takes on so many devices: a simulation of what each of them computes, sends and waits for.

Nothing of it is fitted to published speed-ups. What a device computes and sends is recorded from the hooks themselves
(`recording.py`); how long that takes follows from a machine's rates or from times measured here, and how long messages
take from a link's bandwidth and latency. A device computes in order; messages leave one after another, beside it, and a
layer that needs one waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .operations import Event, Operation, Sent
from .recording import Recording


@dataclass(frozen=True)
class DeviceProfile:
    """How fast a device computes; rates that programs reach, not those of data sheets.

    Attributes:
        flops16, flops32: floating-point operations a second in 16 and 32 bits, 2 for a multiply-add.
        memory: bytes a second.
        launch: seconds that every operation takes at least.
    """

    flops16: float
    flops32: float
    memory: float
    launch: float

    def seconds(self, operation: Operation) -> float:
        """What an operation takes: what was measured, else the slower of arithmetic and memory."""
        if operation.seconds is not None:
            return operation.seconds
        rate = self.flops16 if operation.itemsize <= 2 else self.flops32
        return max(operation.flops / rate, operation.bytes / self.memory, self.launch)


@dataclass(frozen=True)
class Link:
    """How fast a device sends to the others, and receives at the same time.

    Attributes:
        bandwidth: bytes a second, in each direction.
        latency: seconds from sending a message to having it.
        overlaps: whether a device computes while messages travel; not where its own processor moves them.
    """

    bandwidth: float
    latency: float
    overlaps: bool = True


_REACHED, _REACHED_MEMORY = 0.5, 0.8  # of the rates in data sheets, by ordinary kernels
DEVICE_PROFILES = {
    "a100": DeviceProfile(312e12 * _REACHED, 156e12 * _REACHED, 2.0e12 * _REACHED_MEMORY, 5e-6),
    "h100": DeviceProfile(989e12 * _REACHED, 494e12 * _REACHED, 3.35e12 * _REACHED_MEMORY, 5e-6),
    "rtx4090": DeviceProfile(165e12 * _REACHED, 83e12 * _REACHED, 1.0e12 * _REACHED_MEMORY, 5e-6),
}
LINKS = {
    "nvlink3": Link(300e9 * _REACHED_MEMORY, 10e-6),
    "nvlink4": Link(450e9 * _REACHED_MEMORY, 10e-6),
    "pcie4": Link(32e9 * _REACHED_MEMORY, 15e-6),
    "pcie5": Link(64e9 * _REACHED_MEMORY, 15e-6),
    "ethernet-100g": Link(12.5e9 * _REACHED_MEMORY, 30e-6),
    "ethernet-10g": Link(1.25e9 * _REACHED_MEMORY, 50e-6),
}


@dataclass(frozen=True)
class StepTime:
    """One step of one device.

    Attributes:
        seconds: in all.
        computing: of these, computing.
        waiting: of these, waiting for messages.
        travelling: how long messages were on their way; what exceeds `waiting` was hidden behind computation.
        sent: bytes.
    """

    seconds: float
    computing: float
    waiting: float
    travelling: float
    sent: int


def simulate(steps: Sequence[Sequence[Event]], profile: DeviceProfile, link: Link) -> list[StepTime]:
    """Steps that follow each other on one device, all others being in the same place at the same time."""
    now, port = 0.0, 0.0  # the clock of the device, and when its link is free again
    arrivals: dict[int, float] = {}
    found = []
    for events in steps:
        began, computing, waiting, travelling, sent = now, 0.0, 0.0, 0.0, 0
        for event in events:
            if isinstance(event, Operation):
                seconds = profile.seconds(event)
                now, computing = now + seconds, computing + seconds
            elif isinstance(event, Sent):
                transfer = max(event.sent, event.received) / link.bandwidth
                port = max(port, now) + transfer
                arrivals[event.number] = port + link.latency
                travelling, sent = travelling + transfer + link.latency, sent + event.sent
                if not link.overlaps:
                    now, waiting = now + transfer, waiting + transfer
            else:
                pause = max(0.0, arrivals.pop(event.number) - now)
                now, waiting = now + pause, waiting + pause
        found.append(StepTime(now - began, computing, waiting, travelling, sent))
    return found


@dataclass(frozen=True)
class Prediction:
    """An image on so many devices; times in seconds, bytes of the busiest device.

    Attributes:
        devices: how many.
        exact, stale: a step of each kind; `stale` is None if there are none.
        decoding: the VAE's decoder.
        image: all steps and decoding.
        buffers: bytes of the buffers for displaced messages.
        layers: by layer, the seconds of the last kind of step and the bytes that it sends.
    """

    devices: int
    exact: StepTime
    stale: StepTime | None
    decoding: StepTime
    image: float
    buffers: int
    layers: dict[str, tuple[float, int]]

    @property
    def hidden(self) -> float | None:
        """The share of messages' time that computation hides, at the steps that make up most of an image."""
        step = self.stale or self.exact
        return None if step.travelling == 0 else max(0.0, 1 - step.waiting / step.travelling)


def predict(
    recordings: Sequence[Recording], devices: int, profile: DeviceProfile, link: Link, steps: int, warmup: int
) -> Prediction:
    """An image of `steps` steps, `warmup` of them exact, from what some of the devices do; the slowest counts."""
    kinds = len(recordings[0].steps)
    times = [simulate(r.steps, profile, link) for r in recordings]
    exact, last = (max((t[k] for t in times), key=lambda t: t.seconds) for k in (0, -1))
    decoding = max((simulate([r.decoding], profile, link)[0] for r in recordings), key=lambda t: t.seconds)
    slow = min(warmup, steps) if kinds > 1 else steps
    image = slow * exact.seconds + (steps - slow) * last.seconds + decoding.seconds
    layers: dict[str, tuple[float, int]] = {}
    for event in recordings[-1].steps[-1]:
        if isinstance(event, Operation):
            seconds, size = layers.get(event.layer, (0.0, 0))
            layers[event.layer] = seconds + profile.seconds(event), size
    for (_, layer), size in recordings[-1].traffic.items():
        seconds, before = layers.get(layer, (0.0, 0))
        layers[layer] = seconds, before + size
    buffers = max(r.buffer_bytes for r in recordings)
    stale = last if kinds > 1 and slow < steps else None
    return Prediction(devices, exact, stale, decoding, image, buffers, layers)
