"""The state of a training run on disk: safetensors for tensors, JSON for everything else, never pickle.

A folder holds ``state-<step>.safetensors`` (weights, averaged weights, optimizer moments) and ``state.json`` (counters,
seed, optimizer settings, and the name of the tensor file). ``state.json`` is renamed into place last, so at any moment
it names a complete tensor file: a run that is killed while it saves loses nothing but the time since the last save.
It holds a digest of the tensor file and one of itself: what is loaded is what was saved, or it is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffusion_accel.io import first_line, printable, writing
from diffusion_accel.model_files.tensors import check_values, file_digest, read_tensors

from .files import TrainingError, read_json, replacing, require, write_json

STATE = "state.json"
_FILE = re.compile(r"state-\d{8,12}\.safetensors")


def save_state(
    folder: Path,
    model: torch.nn.Module,
    average: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    counters: dict[str, Any],
    weighting: torch.nn.Module | None = None,
) -> None:
    """Write a state; `average` belongs to the trainable parameters in their order, `counters` must hold "step".

    `weighting` is what the optimizer trains after the model's parameters.
    """
    tensors = {f"model.{name}": value for name, value in _own(model).items()}
    if weighting is not None:
        tensors |= {f"weighting.{name}": value for name, value in weighting.state_dict().items()}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    tensors |= {f"average.{name}": value for name, value in zip(names, average, strict=True)}
    state = optimizer.state_dict()
    for index, moments in state["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    file = f"state-{counters['step']:08d}.safetensors"
    with writing(folder / file), replacing(folder / file) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)
        digest = file_digest(temporary)
    content = counters | {"tensors": file, "tensors_digest": digest, "optimizer": state["param_groups"]}
    write_json(folder / STATE, content | {"digest": _digest(content)})
    for old in folder.glob("state-*.safetensors"):
        if old.name != file:
            old.unlink()


def _own(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model, where a tensor that has several names has the first of them."""
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: value.detach() for name, value in state.items() if names.setdefault(id(value), name) == name}


def read_counters(folder: Path) -> dict[str, Any]:
    """What a state holds beside tensors.

    Raises:
        TrainingError: it is not what was saved.
    """
    path = folder / STATE
    found = read_json(path)
    if not isinstance(found, dict):
        raise TrainingError(f"{path} is no state of a training run: it is no table")
    if "digest" not in found:
        raise TrainingError(f"{path} has no digest: it is cut off, or of an older version; start the run again")
    if found["digest"] != _digest(found):
        raise TrainingError(f"{path} is damaged: it is not what was saved (its digest says so)")
    if type(found.get("step")) is not int or not _FILE.fullmatch(str(found.get("tensors"))):
        raise TrainingError(f"{path} is no state of a training run: step and tensors are not what they can be")
    return found


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of everything in a state's JSON but the digest itself."""
    held = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(json.loads(json.dumps(held)), sort_keys=True).encode()).hexdigest()


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    counters = read_counters(folder)
    path = folder / counters["tensors"]
    if not path.is_file() or path.is_symlink():
        raise TrainingError(f"{folder / STATE} names {path.name}, which is no file beside it")
    if file_digest(path) != counters.get("tensors_digest"):
        raise TrainingError(f"{path} is damaged or belongs to another state: it is not the file that was saved")
    found = read_tensors(path, error=TrainingError)
    check_values({name: x for name, x in found.items() if x.is_floating_point()}, path, TrainingError)
    return found


def _check_shapes(folder: Path, wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Raise `TrainingError`, before anything is changed, unless the same names have the same shapes."""
    for name in sorted({*wanted, *found}):
        shapes = [tuple(part[name].shape) if name in part else "nothing" for part in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise TrainingError(
                f"the state in {folder} does not fit this model: it has {shapes[0]} for {printable(name)}, the model "
                f"{shapes[1]}"
            )


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_state(
    folder: Path,
    model: torch.nn.Module,
    average: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    weighting: torch.nn.Module | None = None,
) -> dict[str, Any]:
    """Read a state into the model, the averaged weights, the optimizer and the weighting; returns the counters."""
    counters, tensors = read_counters(folder), _tensors(folder)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    averaged = _part(tensors, "average.")
    _check_shapes(folder, _own(model), _part(tensors, "model."))
    _check_shapes(folder, parameters, averaged)
    try:
        model.load_state_dict(_part(tensors, "model."), strict=False)  # the names are those of `_own`
        if weighting is not None:
            weighting.load_state_dict(_part(tensors, "weighting."))
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        with torch.no_grad():
            for name, value in zip(parameters, average, strict=True):
                value.copy_(averaged[name])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in _part(tensors, "optimizer.").items():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
        for moments, parameter in zip((state[i] for i in sorted(state)), trained, strict=True):
            for key, value in moments.items():
                if value.shape == parameter.shape:  # the fused AdamW needs the moments in the parameter's memory format
                    moments[key] = torch.empty_like(parameter).copy_(value).detach()
        optimizer.load_state_dict({"state": state, "param_groups": counters["optimizer"]})
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise TrainingError(f"the state in {folder} does not fit this model: {first_line(error)}") from error
    return counters


def load_average(folder: Path, model: torch.nn.Module, stage: str) -> None:
    """Load the averaged weights of a run into `model`: what is evaluated and exported."""
    require(folder / STATE, stage)
    tensors = _tensors(folder)
    weights = _part(tensors, "model.") | _part(tensors, "average.")
    _check_shapes(folder, _own(model), weights)
    model.load_state_dict(weights, strict=False)
