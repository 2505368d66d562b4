"""The files of a checkpoint: read within limits, written in parts, checked against each other, and hashed; without
torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from diffusion_accel.errors import ModelLoadError
from diffusion_accel.io import plain, printable, read_json
from diffusion_accel.model_files.names import safetensors_header

from .spec import ModelSpec

SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_CHUNK = 1 << 24  # bytes read at a time
# what diffusers notes in a config about files and versions: no part of how a model computes
_NOTES = frozenset(
    "_class_name _diffusers_version _name_or_path _use_default_values _ignore_files _pre_quantization_dtype auto_map "
    "quantization_config".split()
)


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is stored: type and shape as safetensors has them, file, first byte and number of bytes."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        """Its bytes."""
        left = self.size
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            while left:
                data = stream.read(min(left, _CHUNK))
                if not data:
                    raise ModelLoadError(f"{self.file} was cut off while it was read")
                left -= len(data)
                yield data


# ---------------------------------------------------------------------- reading
def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model's folder. Raises `ModelLoadError` unless it is a table."""
    config = read_json(folder / "config.json", error=ModelLoadError, nonfinite=True)
    if not isinstance(config, dict):
        raise ModelLoadError(f"{folder / 'config.json'} holds no table")
    return config


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The `quantization_config` of a model's config."""
    return ModelSpec.from_dict(config.get("quantization_config"))


def find_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files by name.

    Raises:
        ModelLoadError: a file is none, or its header does not agree with its bytes.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        if file.suffix != ".safetensors" or not file.is_file():
            raise ModelLoadError(f"{file} is no safetensors file; a quantized checkpoint has no others")
        try:
            header = safetensors_header(file)
        except RecursionError as error:
            raise ModelLoadError(f"{file} is not a safetensors file: its header cannot be read") from error
        length = file.stat().st_size - max((v["data_offsets"][1] for k, v in _entries(header)), default=0)
        for name, entry in _entries(header):
            dtype, shape, ends = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
            right = (
                isinstance(dtype, str)
                and dtype in SIZES
                and _whole_numbers(shape)
                and _whole_numbers(ends)
                and len(ends) == 2
                and ends[1] - ends[0] == math.prod(shape) * SIZES[dtype]
            )
            if not right:
                raise ModelLoadError(f"the checkpoint is damaged: {file.name} describes {printable(name)} wrongly")
            found[name] = Tensor(dtype, tuple(shape), file, length + ends[0], ends[1] - ends[0])
    return found


def _entries(header: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in header.items() if k != "__metadata__"]


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 8 and all(type(v) is int and 0 <= v < 2**60 for v in values)


# ---------------------------------------------------------------------- writing
class TensorWriter:
    """A safetensors file whose tensors are written in any order, in parts.

    Args:
        path: the file.
        tensors: type, as safetensors has it, and shape of each by name.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self.path, self.places = path, dict[str, tuple[int, int]]()
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-SIZES[item[1][0]], item[0])):
            size = math.prod(shape) * SIZES[dtype]
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            self.places[name] = (end, size)
            end += size
        header = json.dumps(entries, separators=(",", ":")).encode()
        self.header = header + b" " * (-len(header) % 8)

    def __enter__(self) -> Self:
        self.file: IO[bytes] = self.path.open("wb")
        self.file.write(len(self.header).to_bytes(8, "little") + self.header)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def put(self, name: str, data: Iterable[bytes] | bytes, offset: int = 0) -> None:
        """Bytes of a tensor, from `offset` on."""
        start, size = self.places[name]
        self.file.seek(8 + len(self.header) + start + offset)
        for part in (data,) if isinstance(data, bytes) else data:
            offset += self.file.write(part)
        assert offset <= size, name


# ---------------------------------------------------------------------- digests
def settings_digest(config: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    """SHA-256 over a model's config and how it is quantized, without the notes of diffusers and the digest itself."""
    kept = {k: v for k, v in config.items() if k not in _NOTES}
    values = {"config": kept, "quantization": {k: v for k, v in spec.items() if k not in ("digest", "quant_method")}}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable[Any]]]) -> str:
    """SHA-256 over tensors in the order of their names: name, safetensors type, shape, chunks of their bytes."""
    found = hashlib.sha256()
    for name, dtype, shape, chunks in sorted(tensors, key=lambda t: t[0]):
        found.update(f"{name} {dtype} {json.dumps(list(shape))}\n".encode())
        for chunk in chunks:
            found.update(chunk)
    return found.hexdigest()


def _plain(value: Any) -> Any:
    for way in ("tolist", "as_posix", "to_dict"):
        if callable(getattr(value, way, None)):
            return getattr(value, way)()
    return str(value)


# ---------------------------------------------------------------------- checking
def verify(folder: Path, files: Iterable[Path], warn: Callable[[str], None]) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Check that a checkpoint is the one that was saved, and that all of its numbers can be used.

    Args:
        folder: with `config.json`.
        files: its weights.
        warn: told what an older checkpoint does not allow to check.

    Raises:
        ModelLoadError: it is damaged, or has no digest.
    """
    config = read_config(folder)
    spec, tensors = read_spec(config), find_tensors(files)
    found = tensors_digest((name, t.dtype, t.shape, _finite(name, t)) for name, t in tensors.items())
    if spec.digest is None:
        raise ModelLoadError("the checkpoint is damaged: its quantization_config has no digest")
    if spec.version == 1:
        warn(
            f"{folder} has layout version 1, whose digest covers the quantized layers alone: whether its other numbers "
            "are the ones it was saved with is not known; save it again to have all of it checked"
        )
        return spec, tensors
    settings = settings_digest(config, config["quantization_config"])
    if spec.digest[64:] != found:
        raise ModelLoadError("the checkpoint is damaged: its weights are not the ones it was saved with")
    if spec.digest[:64] != settings:
        raise ModelLoadError("the checkpoint is damaged: its config.json is not the one it was saved with")
    return spec, tensors


def _finite(name: str, tensor: Tensor) -> Iterator[bytes]:
    """The bytes of a tensor. Raises `ModelLoadError` at numbers that nothing can be computed with."""
    import numpy as np  # heavy: commands start by this module

    scale = name.endswith(("_scale",))
    for data in tensor.chunks():
        if tensor.dtype in ("F64", "F32", "F16"):
            values = np.frombuffer(data, f"<f{SIZES[tensor.dtype]}")
            wrong = not np.isfinite(values).all()
            wrong |= scale and bool((values <= 0).any())
        elif tensor.dtype == "BF16":
            wrong = bool((np.frombuffer(data, "<u2") & 0x7F80 == 0x7F80).any())
        else:
            wrong = False
        if wrong:
            what = "finite numbers above 0" if scale else "finite numbers"
            raise ModelLoadError(f"the checkpoint is damaged: {plain(name)} has values that are no {what}")
        yield data
