"""Files of tensors (safetensors) from outside: read in one place, what is wrong with one is said in one line."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from diffusion_accel.errors import AccelerationError
from diffusion_accel.io import first_line, printable

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAME_LIMIT = 300  # characters of a tensor's name


def read_tensors(file: Path, *, error: type[AccelerationError], headers: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; with `headers` names, shapes and types only, on the meta device.

    Raises:
        AccelerationError (of the kind `error`): it is no regular file, is cut off or broken, or a name in it has more
            than `NAME_LIMIT` characters.
    """
    if not file.is_file():
        state = "is no regular file" if file.exists() else "does not exist"
        raise error(f"{file} cannot be read: it {state}")
    found: dict[str, torch.Tensor] = {}
    try:
        with safe_open(str(file), framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - no mapping
                if len(name) > NAME_LIMIT:
                    raise error(f"{file} cannot be read: a name in it has {len(name)} characters")
                found[name] = _of_shape(stored.get_slice(name)) if headers else stored.get_tensor(name)
    except AccelerationError:
        raise
    except Exception as problem:  # SafetensorError, and whatever torch makes of types and sizes that it does not know
        reason = first_line(problem) if isinstance(problem, (SafetensorError, OSError)) else type(problem).__name__
        raise error(f"{file} is no whole safetensors file: {printable(reason)}; get a fresh copy") from problem
    return found


def _of_shape(stored: object) -> torch.Tensor:
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    shape, kind = stored.get_shape(), stored.get_dtype()  # type: ignore[attr-defined]
    return torch.empty(shape, dtype=types.get(kind, torch.int64), device="meta")


def check_values(
    tensors: Mapping[str, torch.Tensor], file: Path, error: type[AccelerationError], largest: float | None = None
) -> None:
    """Raise `error` unless all tensors hold finite floating-point numbers, of an amount of at most `largest`."""
    for name, value in tensors.items():
        if value.dtype not in FLOATS:
            raise error(f"{file}: {printable(name)} holds no floating-point numbers")
        if value.is_meta or not value.numel():
            continue
        low, high = (float(one) for one in value.aminmax())
        amount = max(-low, high)
        if not amount < float("inf"):  # NaN, too
            raise error(f"{file}: {printable(name)} holds values that are no numbers (NaN or infinite)")
        if largest is not None and amount > largest:
            raise error(f"{file}: {printable(name)} holds {amount:.3g}; weights are at most {largest:g}")


def file_digest(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
