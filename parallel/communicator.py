"""Messages between processes: exchanged at once, or posted at one step and read at the next, and counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from .group import lost_peer

_TAGS = 2**15
_ALIGNED = 16  # bytes
Shape = tuple[int, ...]


@dataclass
class Slot:
    """What one layer last got from the others.

    Attributes:
        shape: of the tensors with which it was filled; values of another shape are of another call.
        received: by process, what it sent.
        own: what this process sent with it.
    """

    shape: Any
    received: dict[int, torch.Tensor]
    own: Any = None
    batch: Batch | None = None


@dataclass
class Batch:
    """Messages that travel together: one flat tensor for each process."""

    works: list[Any] = field(default_factory=list)
    buffers: list[torch.Tensor] = field(default_factory=list)  # kept until the works are done


@dataclass
class _Post:
    key: Any
    slot: Slot
    sends: dict[int, torch.Tensor]
    shapes: dict[int, Shape]
    dtype: torch.dtype


class Communicator:
    """Point-to-point messages of one pipeline call.

    Every process makes the same calls in the same order. `swap` exchanges and waits. `post` puts a layer's fresh values
    into a batch that is sent in the background; `take` waits for those that the others posted at the step before.

    Args:
        group: the process group.
        batch: messages of so many layers travel together; the same number at every process, whatever their sizes.

    Attributes:
        traffic: bytes that this process has sent, by (kind, layer).
    """

    def __init__(self, group: Any, batch: int) -> None:
        self.group = group
        self.batch = batch
        self.slots: dict[Any, Slot] = {}
        self.traffic: Counter[tuple[str, str]] = Counter()
        self._tag = 0
        self._posts: list[_Post] = []
        self._buffers: dict[Any, torch.Tensor] = {}
        self._waiting: list[Batch] = []
        self._last: dict[Any, Batch] = {}  # by layout: whose messages are in its buffers

    # ------------------------------------------------------------------ at once
    def swap(
        self, what: tuple[str, str], sends: dict[int, torch.Tensor], shapes: dict[int, Shape], like: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        """Send tensors to processes and get tensors of known shapes from processes, in the type of `like`."""
        self._count(what, sends)
        received = {source: like.new_empty(shape) for source, shape in shapes.items()}
        batch = self._transfer(sends, received)
        self._wait(batch)
        return received

    # ------------------------------------------------------------------ in the background
    def take(self, key: Any, shape: Any) -> Slot | None:
        """What a layer got at the step before; None if there is nothing of that shape."""
        slot = self.slots.get(key)
        if slot is None or slot.shape != shape:
            return None
        if slot.batch is not None:
            self._wait(slot.batch)
            slot.batch = None
        return slot

    def keep(self, key: Any, shape: Any, received: dict[int, torch.Tensor], own: Any = None) -> None:
        """Note what a layer got just now, for the next step."""
        self.slots[key] = Slot(shape, received, own)

    def post(
        self,
        what: tuple[str, str],
        key: Any,
        shape: Any,
        sends: dict[int, torch.Tensor],
        shapes: dict[int, Shape],
        like: torch.Tensor,
        own: Any = None,
    ) -> None:
        """Send a layer's fresh values in the background; `take` gets the others' at the next step."""
        if len(self._posts) >= self.batch:  # not sooner: the layer that filled the batch has read its buffer by now
            self.flush(like.device)
        self._count(what, sends)
        slot = self.slots[key] = Slot(shape, {}, own)
        self._posts.append(_Post(key, slot, sends, shapes, like.dtype))

    def flush(self, device: Any) -> None:
        """Send what was posted."""
        posts, self._posts = self._posts, []
        if not posts:
            return
        layout = tuple((p.key, p.slot.shape) for p in posts)
        if layout in self._last:  # done long ago, if the layers have waited for what they got
            self._wait(self._last[layout])
        sends, received = {}, {}
        for peer in sorted({q for p in posts for q in p.sends}):
            parts = [p.sends[peer] for p in posts if peer in p.sends]
            offsets = _offsets([t.numel() * t.element_size() for t in parts])
            flat = sends[peer] = self._buffer(("send", peer, layout), offsets[-1], device)
            for part, begin in zip(parts, offsets, strict=False):
                length = part.numel() * part.element_size()
                flat[begin : begin + length].view(part.dtype).copy_(part.flatten())
        for peer in sorted({q for p in posts for q in p.shapes}):
            theirs = [p for p in posts if peer in p.shapes]
            lengths = [_bytes(p.shapes[peer], p.dtype) for p in theirs]
            offsets = _offsets(lengths)
            flat = received[peer] = self._buffer(("receive", peer, layout), offsets[-1], device)
            for p, begin, length in zip(theirs, offsets, lengths, strict=False):
                p.slot.received[peer] = flat[begin : begin + length].view(p.dtype).view(p.shapes[peer])
        batch = self._transfer(sends, received)
        self._waiting = [b for b in self._waiting if b.works] + [batch]
        self._last[layout] = batch
        for p in posts:
            p.slot.batch = batch

    def _buffer(self, key: Any, size: int, device: Any) -> torch.Tensor:
        """Memory that serves the same messages at every step."""
        if key not in self._buffers:
            self._buffers[key] = torch.empty(size, dtype=torch.uint8, device=device)
        return self._buffers[key]

    @property
    def buffer_bytes(self) -> int:
        """The bytes of all buffers."""
        return sum(b.numel() for b in self._buffers.values())

    def close(self) -> None:
        """Wait for what is still on its way (every message that a process posted, the others expect) and free all."""
        waiting, self._waiting, self._posts = self._waiting, [], []
        self.slots.clear()
        self._last.clear()
        try:
            for batch in waiting:
                self._wait(batch)
        finally:
            self._buffers.clear()

    # ------------------------------------------------------------------ transport
    def _transfer(self, sends: dict[int, torch.Tensor], received: dict[int, torch.Tensor]) -> Batch:
        self._tag = (self._tag + 1) % _TAGS
        out = {peer: tensor.contiguous() for peer, tensor in sends.items() if tensor.numel()}
        back = {peer: tensor for peer, tensor in received.items() if tensor.numel()}
        operations = [dist.P2POp(dist.isend, out[p], p, self.group, self._tag) for p in sorted(out)]
        operations += [dist.P2POp(dist.irecv, back[p], p, self.group, self._tag) for p in sorted(back)]
        if not operations:
            return Batch()
        with lost_peer():
            works = dist.batch_isend_irecv(operations)
        return Batch(works, [*out.values(), *back.values()])

    def _wait(self, batch: Batch) -> None:
        works, batch.works = batch.works, []
        with lost_peer():
            for work in works:
                work.wait()
        batch.buffers = []

    def _count(self, what: tuple[str, str], sends: dict[int, torch.Tensor]) -> None:
        self.traffic[what] += sum(t.numel() * t.element_size() for t in sends.values())


def _offsets(lengths: list[int]) -> list[int]:
    """Where pieces of so many bytes begin in a buffer, each aligned for every type, and the size of the buffer."""
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + -(-length // _ALIGNED) * _ALIGNED)
    return offsets


def _bytes(shape: Shape, dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for extent in shape:
        count *= extent
    return count
