"""LoRAs that requests name: known from the start, loaded when one is first asked for, a few kept in memory."""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import nn

from diffusion_accel.arguments import nearest
from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.io import shown
from diffusion_accel.pipelines.loaded import check_lora
from diffusion_accel.pipelines.loading import load_lora

logger = logging.getLogger(__name__)

SCALES = (-10.0, 10.0)
_READERS = 2  # files that are read at a time
_PIECE = 2**24  # bytes


class Adapters:
    """The LoRAs of one pipeline by name.

    They stay beside the weights (peft's layers), so changing which of them act costs no arithmetic on weights, and
    without any the layers compute what they did before.

    Args:
        pipe: the pipeline whose models they change.
        files: name -> file; or a folder, each of whose `.safetensors` files is a LoRA by the name of the file.
        kept: how many are kept in memory, at least; those of one request may be more.
        told: called in some thread whenever a file has been read.

    Raises:
        ConfigurationError: the folder or a file does not exist, or the pipeline has LoRAs of its own already.
    """

    def __init__(
        self,
        pipe: Any,
        files: Mapping[str, str | Path] | str | Path,
        kept: int = 4,
        told: Callable[[], object] | None = None,
    ) -> None:
        if isinstance(files, Mapping):
            self.files = {name: Path(file) for name, file in files.items()}
        elif not Path(files).is_dir():
            raise ConfigurationError(f"loras must be a folder, or files by name; there is no folder {files}")
        else:
            self.files = {file.stem: file for file in sorted(Path(files).glob("*.safetensors"))}
        for file in self.files.values():
            if not file.is_file():
                raise ConfigurationError(f"there is no LoRA {file}")
        if self.files and any(len(layer.lora_A) for layer in _layers(pipe)):
            raise ConfigurationError(
                "the pipeline has LoRAs already; give it without them, and name them in `loras` instead"
            )
        self._pipe, self._kept = pipe, kept
        self._inner = {name: name for name in self.files}  # what the pipeline has them by: another one of a name later
        self._paths = dict(self.files)  # of all that there ever were, by that
        self._loaded: OrderedDict[str, None] = OrderedDict()  # the one that was used last is the last
        self._told = told
        self._reading: dict[str, Future[None]] = {}
        self._readers = ThreadPoolExecutor(_READERS, "lora")  # which has no threads before it has work
        self._lock = threading.Lock()

    def chosen(self, loras: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        """LoRAs with their scales, in the same order whoever asks.

        Raises:
            ConfigurationError: there is none of that name, or a scale is not between -10 and 10.
        """
        for name, scale in loras.items():
            if name not in self.files:
                near = nearest(str(name)[:100], self.files)
                hint = f"did you mean {near!r}?" if near else f"there are: {', '.join(self.files) or 'none'}"
                raise ConfigurationError(f"there is no LoRA {shown(name)}; {hint}")
            fine = isinstance(scale, (int, float)) and not isinstance(scale, bool) and math.isfinite(scale)
            if not fine or not SCALES[0] <= scale <= SCALES[1]:
                raise ConfigurationError(f"the scale of a LoRA must be a number of -10 to 10, got {shown(scale)}")
        return tuple(sorted((self._inner[name], float(scale)) for name, scale in loras.items()))

    def add(self, name: str, file: Path) -> None:
        """Let requests name a LoRA, or another file by a name that there was.

        Raises:
            ConfigurationError: there is no such file.
        """
        if not file.is_file():
            raise ConfigurationError(f"there is no LoRA {shown(name)}")
        earlier = sum(inner.partition("#")[0] == name for inner in self._paths)
        inner = f"{name}#{earlier}" if earlier else name
        self._paths[inner] = file
        self._inner[name] = inner
        self.files = {**self.files, name: file}

    def remove(self, name: str) -> None:
        """Let requests name it no longer; those that have it already are drawn.

        Raises:
            ConfigurationError: there is none of that name.
        """
        if name not in self.files:
            raise ConfigurationError(f"there is no LoRA {shown(name)}; there are: {', '.join(self.files) or 'none'}")
        self.files = {known: file for known, file in self.files.items() if known != name}

    def fetch(self, adapters: tuple[tuple[str, float], ...]) -> list[Future[None]]:
        """Begin to read what is not in memory: what ends when that can be activated without waiting for files. Each
        raises `ModelLoadError` for a file that is broken or gone."""
        with self._lock:
            return [self._read(name) for name, _ in adapters if name not in self._loaded]

    def _read(self, name: str) -> Future[None]:
        reading = self._reading.get(name)
        if reading is None or reading.done():
            reading = self._reading[name] = self._readers.submit(read_lora, self._paths[name])
            reading.add_done_callback(self._was_read)
        return reading

    def _was_read(self, _reading: Future[None]) -> None:
        if self._told is not None:
            self._told()

    def activate(self, adapters: tuple[tuple[str, float], ...]) -> None:
        """Let these act and no others; loads what is not there, and forgets what was not used for longest.

        Raises:
            ModelLoadError: a file is broken or does not fit the model.
        """
        names = [name for name, _ in adapters]
        for name in names:
            if name not in self._loaded:
                load_lora(self._pipe, str(self._paths[name]), name)
            self._loaded[name] = None
            self._loaded.move_to_end(name)
        if adapters:
            self._pipe.set_adapters(names, [scale for _, scale in adapters])
        for layer in _layers(self._pipe):
            layer.enable_adapters(bool(adapters))
        spare = [name for name in self._loaded if name not in names]
        current = {self._inner[name] for name in self.files}
        over = spare[: max(0, len(self._loaded) - self._kept)]
        for old in [name for name in spare if name in over or name not in current]:
            del self._loaded[old]
            self._pipe.delete_adapters(old)
            logger.info("the LoRA %s is no longer in memory", old)

    def forget(self) -> None:
        """Take all of them off the pipeline; the layers that peft has put around others stay, and do nothing."""
        self._readers.shutdown(cancel_futures=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, that one was active
            while self._loaded:
                self._pipe.delete_adapters(self._loaded.popitem()[0])


def read_lora(file: Path) -> None:
    """Read a file to its end, so that the system has it in memory when the pipeline loads it.

    Raises:
        ModelLoadError: it is broken or gone.
    """
    check_lora(file)
    try:
        with file.open("rb") as opened:
            while opened.read(_PIECE):
                pass
    except OSError as error:
        raise ModelLoadError(f"the LoRA {file} cannot be read: {error.strerror}") from error


def _layers(pipe: Any) -> list[Any]:
    """The layers that peft has put around others."""
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return [m for model in models for m in model.modules() if hasattr(m, "enable_adapters") and hasattr(m, "lora_A")]
