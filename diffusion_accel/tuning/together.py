"""Several processes with one search, on a device each: every one has its own images, the first one decides.

What passes between them is small: sums, numbers and texts. Sums are in float64 and in the order of the processes, so
that all have the same; what is decided, also by the clock, is decided by the first process and told to the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from diffusion_accel.errors import AccelerationError, ConfigurationError
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.parallel.group import join, lost_peer

TIMEOUT = 1800.0  # seconds; while one process times calls, the others wait


class FirstFailedError(AccelerationError):
    """The first process of a search failed, with this message."""

    consequence = True


@dataclass(frozen=True)
class Together:
    """One of `size` processes, number `rank` of them; by itself the only one, which sends nothing.

    Of the images of a search, in their order, each process has every `size`-th.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    device: str = "cpu"  # of messages

    @classmethod
    def joined(cls, device: torch.device, timeout: float = TIMEOUT) -> Together:
        """The processes of the job (torchrun, `accelerate launch`); one if no launcher started this process.

        Args:
            device: where the pipeline of this process computes.
            timeout: seconds after which a process that does not answer is given up.

        Raises:
            PeerError: the processes did not find each other.
            ConfigurationError: there is no such device.
        """
        world = join(device, timeout)
        if world.group is None:
            return cls()
        only_cuda = dist.get_backend(world.group) == "nccl"  # of a group that was there
        return cls(world.rank, world.size, world.group, "cuda" if only_cuda else "cpu")

    @property
    def first(self) -> bool:
        """Whether this process decides, writes and prints."""
        return self.rank == 0

    # ------------------------------------------------------------------ who has which images
    def numbers(self, images: Sequence[int]) -> list[int]:
        """The numbers in the whole search of images of this process."""
        return [image * self.size + self.rank for image in images]

    def among(self, count: int) -> range:
        """Which images of this process are among the first `count` of the search."""
        return range(len(range(self.rank, count, self.size)))

    def most(self, count: int) -> int:
        """How many of the first `count` images a process has at most."""
        return -(-count // self.size)

    def part(self, sampler: Sampler) -> Sampler:
        """A sampler of the images of this process, with the same seeds."""
        own = sampler.prompts[self.rank :: self.size]
        seed = sampler.seed + self.rank * sampler.stride
        scales = sampler.scales[self.rank :: self.size]
        return replace(sampler, prompts=own, seed=seed, stride=sampler.stride * self.size, scales=scales)

    # ------------------------------------------------------------------ messages
    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, in float64 on the CPU, the same at each."""
        own = tensor.double()
        if self.size == 1:
            return own
        return torch.stack(self._gathered(own)).sum(0)

    def everyone(self, value: Any) -> list[Any]:
        """A value of every process that JSON can hold, in their order."""
        if self.size == 1:
            return [value]
        text = _packed(value)
        lengths = [int(n) for n in torch.stack(self._gathered(torch.tensor([len(text)]))).flatten()]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(text)] = text
        return [_unpacked(part[:n]) for part, n in zip(self._gathered(padded), lengths, strict=True)]

    def agreed(self, value: Any) -> Any:
        """The value of the first process, which JSON can hold."""
        if self.size == 1:
            return value
        text = _packed(value)
        length = self._told(torch.tensor([len(text)]))
        return _unpacked(self._told(text if self.first else torch.zeros(int(length), dtype=torch.uint8)))

    def in_order(self, values: Sequence[Any]) -> list[Any]:
        """A value for each image of every process, in the order of the search."""
        parts = self.everyone(list(values))
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def check(self, images: int, values: dict[str, Any]) -> None:
        """Raise `ConfigurationError` if there are more processes than images, or they were asked for different
        things."""
        if images < self.size:
            raise ConfigurationError(f"{self.size} processes are too many for {images} images; start at most {images}")
        asked = self.everyone({k: json.dumps(v, sort_keys=True, default=_plain) for k, v in values.items()})
        different = [name for name in values if any(other[name] != asked[0][name] for other in asked)]
        if different:
            raise ConfigurationError(
                f"the processes of one search must be asked for the same, but {', '.join(different)} differ"
            )

    def _gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        sent = tensor.contiguous().to(self.device)
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        with lost_peer():
            dist.all_gather(parts, sent, group=self.group)
        return [part.cpu() for part in parts]

    def _told(self, tensor: torch.Tensor) -> torch.Tensor:
        sent = tensor.to(self.device)
        with lost_peer():
            dist.broadcast(sent, 0, group=self.group)
        return sent.cpu()


ALONE = Together()


class Tasks:
    """What all processes of a search do when the first one says so, which so decides alone.

    Attributes:
        known: by name; each is given a value that JSON can hold.
    """

    def __init__(self, together: Together, known: Mapping[str, Callable[[Any], Any]]) -> None:
        self.together, self.known = together, known
        self._inside = False

    def do(self, name: str, argument: Any) -> Any:
        """Of the first process: have all of them do a task. Returns what it has of it itself."""
        self.together.agreed([name, argument])
        self._inside = True
        result = self.known[name](argument)
        self._inside = False
        return result

    def lead(self, search: Callable[[], Any]) -> Any:
        """Of the first process: search, with `do`. Whatever fails between tasks is told to the others."""
        try:
            return search()
        except Exception as error:
            if not self._inside:
                self.together.agreed([None, str(error)])
            raise

    def end(self, value: Any) -> None:
        """Of the first process: tell the others what the search found."""
        self.together.agreed(["", value])

    def follow(self) -> Any:
        """Of the others: do what the first one says until it has found something, which is returned.

        Raises:
            FirstFailedError: it found nothing, or failed.
        """
        while True:
            name, argument = self.together.agreed(None)
            if name is None:
                raise FirstFailedError(argument)
            if not name:
                return argument
            self.known[name](argument)


def _plain(value: Any) -> str:
    return type(value).__name__


def _packed(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _unpacked(tensor: torch.Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))
