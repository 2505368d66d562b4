"""Single files in the layout of a model's authors: which of their tensors are which of a model of diffusers, and the
other parts of the pipeline as folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import snapshot_download
from torch import nn

from diffusion_accel.diffusers_compat import converted_names, original_repository
from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.finite import finite
from diffusion_accel.io import at_home, first_line, is_there, plain, printable, read_json, shown
from diffusion_accel.model_files.folders import check_folder
from diffusion_accel.model_files.hub import HUB_ID, hub_reason
from diffusion_accel.model_files.index_notes import INDEX

from .stored import Tensor

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_CONFIGS = ["*.json", "**/*.json", "*.txt", "**/*.txt", "**/*.model"]  # of a repository, as diffusers takes them
#: how names of other parts than the denoiser begin
_OTHERS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.")
_SHARE = 0.01  # of the other parts' bytes, from which on their type counts


# ---------------------------------------------------------------------- tensors that are made when they are read
@dataclass(frozen=True)
class Made:
    """A tensor that is computed from stored ones: what a `Tensor` is, and the function that makes it."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    make: Callable[[], torch.Tensor]

    def chunks(self) -> Iterator[bytes]:
        """Its bytes."""
        yield self.make().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class _Later:
    """What a converter is given in the place of a tensor: it has a shape, and notes what is done to it.

    Args:
        meta: of the same shape and type, without values.
        make: the values.
        stored: where they are stored; None once something was done to them.
    """

    def __init__(self, meta: torch.Tensor, make: Callable[[], torch.Tensor], stored: Tensor | None = None) -> None:
        self.meta, self.make, self.stored = meta, make, stored

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _noted(function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.meta, name)
        if isinstance(found, torch.Tensor):
            return _noted(getattr, (self, name), {})
        if not callable(found):
            return found
        return lambda *args, **kwargs: _noted(getattr(torch.Tensor, name), (self, *args), kwargs)

    def __getitem__(self, index: Any) -> Any:
        return _noted(torch.Tensor.__getitem__, (self, index), {})


def _noted(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """What a function of tensors returns, computed when it is wanted."""

    def call(way: Callable[[_Later], torch.Tensor]) -> Any:
        return function(*_each(args, way), **{key: _each(value, way) for key, value in kwargs.items()})

    def part(place: int | None) -> torch.Tensor:
        with torch.no_grad():
            made = call(lambda later: later.make())
        found: torch.Tensor = made if place is None else made[place]
        return found

    shapes = call(lambda later: later.meta)
    if isinstance(shapes, torch.Tensor):
        return _Later(shapes, lambda: part(None))
    if isinstance(shapes, (list, tuple)) and all(isinstance(one, torch.Tensor) for one in shapes):
        return [_Later(one, lambda place=place: part(place)) for place, one in enumerate(shapes)]  # type: ignore[misc]
    return shapes


def _each(value: Any, way: Callable[[_Later], torch.Tensor]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_each(one, way) for one in value)
    return way(value) if isinstance(value, _Later) else value


def read(tensor: Tensor | Made) -> torch.Tensor:
    """The values of a tensor of floating-point numbers."""
    if isinstance(tensor, Made):
        return tensor.make()
    data = bytearray(b"".join(tensor.chunks()))
    return torch.frombuffer(data, dtype=FLOATS[tensor.dtype]).view(tensor.shape)


def _later(tensor: Tensor) -> _Later:
    kind = FLOATS.get(tensor.dtype, torch.uint8)  # others are shapes only: no weight of a denoiser
    return _Later(torch.empty(tensor.shape, dtype=kind, device="meta"), lambda: read(tensor), tensor)


# ---------------------------------------------------------------------- the denoiser
def denoiser_tensors(file: Path, held: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor | Made]:
    """The tensors of a denoiser in a file, by the names of its class.

    Diffusers' own conversion runs on tensors without values, so that it is known of each parameter how it is made of
    what the file has; nothing is read.

    Args:
        file: for errors.
        held: all tensors in it.
        model: the denoiser, without weights.

    Raises:
        ModelLoadError: the file is in no layout that diffusers knows for this class.
    """
    wanted = model.state_dict().keys()
    if held.keys() == wanted:
        return dict(held)
    name = type(model).__name__
    try:
        found = converted_names(type(model), dict(model.config), {key: _later(t) for key, t in held.items()})  # type: ignore[arg-type]
    except Exception as error:  # a KeyError or IndexError, mostly
        raise ModelLoadError(
            f"{file} cannot be read as a {name}: {type(error).__name__}, {first_line(error)}"
        ) from error
    if not found:
        raise ModelLoadError(f"{file} has no weights of a {name} in a layout that diffusers knows")
    return {key: _as_stored(value) for key, value in found.items() if value is not None}


def _as_stored(value: Any) -> Tensor | Made:
    if isinstance(value, _Later) and value.stored is not None:
        return value.stored
    meta = value.meta if isinstance(value, _Later) else value
    make = value.make if isinstance(value, _Later) else lambda: value
    return Made(_NAMES.get(meta.dtype, str(meta.dtype)), tuple(meta.shape), meta.nbytes, make)


# ---------------------------------------------------------------------- the configuration
def config_folder(file: Path, held: Mapping[str, Tensor], config: str | Path | None) -> Path:
    """The pipeline folder whose configurations describe a file.

    Args:
        file: the file.
        held: its tensors.
        config: a folder, or a hub id; None: the repository that diffusers takes such a file to be of.

    Raises:
        ConfigurationError: `config` is neither.
        ModelLoadError: the hub's is not on this machine and cannot be fetched, or the folder is damaged.
    """
    if config is not None and is_there(at_home(config), "dir"):
        folder = at_home(config)
    else:
        name = original_repository({k: _later(t) for k, t in held.items()}) if config is None else str(config)
        if not HUB_ID.fullmatch(name):
            raise ConfigurationError(f"config must be a pipeline folder or a hub id, got {shown(config)}")
        try:
            folder = Path(snapshot_download(name, allow_patterns=_CONFIGS))
        except Exception as error:  # the hub raises many kinds
            reason = hub_reason(name, error) or first_line(error)
            raise ModelLoadError(
                f"the configuration of {file} ({name}) cannot be loaded: {reason}; or give config, a folder of such a "
                "pipeline"
            ) from error
    check_folder(folder)
    return folder


# ---------------------------------------------------------------------- the other parts
def write_others(file: Path, held: Mapping[str, Tensor], configs: Path, denoiser: str, made: Path) -> None:
    """Write the parts of a pipeline but its denoiser: those that the file has, or else copies of the folder's.

    Args:
        file: the file, which diffusers maps into memory; the denoiser's weights are not touched.
        held: its tensors.
        configs: the pipeline folder whose configurations describe it.
        denoiser: the name of the part that is left out.
        made: the folder to write to.

    Raises:
        ModelLoadError: a part is neither in the file nor in the folder, or does not fit its configuration.
    """
    index = read_json(configs / INDEX, error=ModelLoadError)
    others = [tensor for name, tensor in held.items() if name.startswith(_OTHERS)]
    if not others:
        _copy_others(file, configs, denoiser, made)
        return
    cls: Any = getattr(diffusers, str(index["_class_name"]), None)
    if not hasattr(cls, "from_single_file"):
        raise ModelLoadError(
            f"{configs / INDEX} names a pipeline that no single file has: {plain(index['_class_name'])}"
        )
    try:
        pipe = cls.from_single_file(
            str(file), config=str(configs), dtype=_dtype(others), local_files_only=True, **{denoiser: None}
        )
    except Exception as error:  # diffusers and transformers raise many kinds
        reason = "weights of one are missing" if "meta tensor" in str(error) else first_line(error)
        raise ModelLoadError(
            f"the other parts of {file} cannot be loaded with the configuration {configs}: {reason}"
        ) from error
    for part, model in pipe.components.items():
        for name, value in model.named_parameters() if isinstance(model, nn.Module) else ():
            if not finite(value):
                raise ModelLoadError(f"{printable(name)} of the {part} in {file} has values that are no finite numbers")
        if model is not None:
            model.save_pretrained(made / part)
    pipe.save_config(made)
    written = json.loads((made / INDEX).read_text(encoding="utf-8")) | {denoiser: index[denoiser]}
    (made / INDEX).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_others(file: Path, configs: Path, denoiser: str, made: Path) -> None:
    parts = sorted(entry for entry in configs.iterdir() if entry.is_dir() and entry.name != denoiser)
    for part in parts:
        if (part / "config.json").is_file() and not any(part.glob("*.safetensors")):
            raise ModelLoadError(
                f"{file} holds a denoiser only, and {part} has no safetensors weights; give as config the folder of a "
                "whole pipeline"
            )
    for part in parts:
        shutil.copytree(part, made / part.name)
    shutil.copy(configs / INDEX, made)


def _dtype(tensors: list[Tensor]) -> torch.dtype:
    """A type that holds all values: of the types of which there are more than a few numbers, such as schedules."""
    total = sum(tensor.size for tensor in tensors)
    sizes = {kind: sum(t.size for t in tensors if t.dtype == kind) for kind in FLOATS}
    kinds = [FLOATS[kind] for kind, size in sizes.items() if size > _SHARE * total]
    return reduce(torch.promote_types, kinds) if kinds else torch.float16
