"""Weights files before anything is loaded from them: what a safetensors file holds, checked against its length.

Why not `safetensors.safe_open`: it opens whatever it is given (a pipe would wait for ever), takes headers of 100 MB and
names of any length, lets the last of two equal names win, and says "incomplete metadata" of a file that is cut off.
What passes here is then opened by it (`tensors.py`, diffusers, transformers).
"""

from __future__ import annotations

import json
import math
import stat
import struct
from pathlib import Path
from typing import Any

from diffusion_accel.errors import ModelLoadError
from diffusion_accel.io import at_home, printable

PICKLE_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})
HEADER_LIMIT = 32 * 2**20  # bytes; a model of 10,000 tensors has 2 MB
NAME_LIMIT = 1000  # characters of a tensor's name
LORA_FILE = "pytorch_lora_weights.safetensors"  # as `save_lora_weights` of diffusers' pipelines calls it

# bits of one value
BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32},
    **{"I64": 64, "U64": 64, "F64": 64, "C64": 64, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6},
}


def check_weights(file: Path, allow_pickle: bool | None = False) -> None:
    """Check one weights file: safetensors whose header and length agree, or a pickle that was allowed.

    Args:
        file: the weights.
        allow_pickle: whether they may be a pickle; None: of what they are for never.
    """
    if file.suffix in PICKLE_SUFFIXES:
        if allow_pickle:
            check_regular(file)
            return
        allowed = "" if allow_pickle is None else ", or allow it with allow_pickle=True if you trust its source"
        raise ModelLoadError(f"{file} is a pickle, which can run code when loaded; convert it to safetensors{allowed}")
    if file.suffix != ".safetensors":
        what = "a model" if allow_pickle is not None else "a file of weights"
        folder = " or a diffusers pipeline folder" if allow_pickle is not None else ""
        raise ModelLoadError(f"{file} is not {what}: expected a .safetensors file{folder}")
    safetensors_header(file)


def lora_file(place: Path | str) -> Path:
    """The weights of a LoRA: a file, or that of a folder which `save_lora_weights` wrote, or its only safetensors file.

    Raises:
        ModelLoadError: there is neither, or several may be meant.
    """
    place = at_home(place)
    if not place.is_dir():
        return place
    if (place / LORA_FILE).is_file():
        return place / LORA_FILE
    others = sorted(place.glob("*.safetensors"))
    if len(others) != 1:
        raise ModelLoadError(
            f"the LoRA {place} is a folder with {len(others) or 'no'} .safetensors files, none of them {LORA_FILE}; "
            "name the file"
        )
    return others[0]


def check_regular(file: Path) -> int:
    """The size of a regular file; raises `ModelLoadError` for folders, pipes, sockets, devices and what is not there.

    Opening a pipe would wait for ever, and a device never ends.
    """
    try:
        status = file.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ModelLoadError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise ModelLoadError(f"{file} cannot be read: it is {kind}")
    return status.st_size


def safetensors_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file (tensor name -> dtype, shape, data_offsets), checked against its length.

    Raises:
        ModelLoadError: the file is no regular file, cut off, longer than its header says, or its header is damaged:
            a name that is there twice, an unknown type, a shape that does not fit its bytes, bytes that belong to two
            tensors or to none.
    """
    size = check_regular(file)
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(size - 8, HEADER_LIMIT):
                raise ModelLoadError(f"{file} is not a whole safetensors file: its header is missing or cut off")
            text = stream.read(length)
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("it is no table")
        spans = sorted(_span(name, entry) for name, entry in header.items() if name != "__metadata__")
        _check_metadata(header.get("__metadata__"))
    except (ValueError, RecursionError) as error:
        reason = "it lies too deep in itself" if isinstance(error, RecursionError) else printable(str(error)[:200])
        raise ModelLoadError(f"{file} is not a safetensors file: its header cannot be read ({reason})") from error
    end = max((end for _, end in spans), default=0)
    if size != 8 + length + end:
        state = "cut off" if size < 8 + length + end else "longer than its header says"
        raise ModelLoadError(f"{file} is {state}: {size} bytes instead of {8 + length + end}; get a fresh copy")
    place = 0
    for begin, end in spans:
        if begin != place:
            raise ModelLoadError(f"{file} is damaged: its tensors overlap or leave gaps at byte {min(begin, place)}")
        place = end
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in found if names.count(n) > 1)[:80]!r} is there twice")
    return found


def _span(name: str, entry: object) -> tuple[int, int]:
    if len(name) > NAME_LIMIT:
        raise ValueError(f"a name has {len(name)} characters")
    if any("\ud800" <= sign <= "\udfff" for sign in name):
        raise ValueError(f"{name[:80]!r} is no text")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:80]!r} has no dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    bits = BITS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if bits is None:
        raise ValueError(f"{name[:80]!r} has the unknown type {str(entry['dtype'])[:20]}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise ValueError(f"{name[:80]!r} has a shape or offsets that are no whole numbers")
    if len(offsets) != 2 or len(shape) > 16 or math.prod(shape) * bits != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"the shape of {name[:80]!r} does not fit its bytes")
    return offsets[0], offsets[1]


def _check_metadata(values: object) -> None:
    if values is not None and (not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values())):
        raise ValueError("__metadata__ is no table of texts")
