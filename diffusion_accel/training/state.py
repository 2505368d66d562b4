"""The state of a training run on disk: safetensors for tensors, JSON for everything else, never pickle.

A folder holds ``state-<step>.safetensors`` (weights, averaged weights, optimizer moments) and ``state.json`` (counters,
seed, optimizer settings, and the name of the tensor file). ``state.json`` is renamed into place last, so at any moment
it names a complete tensor file: a run that is killed while it saves loses nothing but the time since the last save.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .files import TrainingError, read_json, replacing, require, write_json

STATE = "state.json"


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
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    if weighting is not None:
        tensors |= {f"weighting.{name}": value for name, value in weighting.state_dict().items()}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    tensors |= {f"average.{name}": value for name, value in zip(names, average, strict=True)}
    state = optimizer.state_dict()
    for index, moments in state["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    file = f"state-{counters['step']:08d}.safetensors"
    with replacing(folder / file) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)
    write_json(folder / STATE, counters | {"tensors": file, "optimizer": state["param_groups"]})
    for old in folder.glob("state-*.safetensors"):
        if old.name != file:
            old.unlink()


def read_counters(folder: Path) -> dict[str, Any]:
    return read_json(folder / STATE)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / read_counters(folder)["tensors"]
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error


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
    try:
        model.load_state_dict(_part(tensors, "model."))
        trained = list(parameters.values())
        if weighting is not None:
            weighting.load_state_dict(_part(tensors, "weighting."))
            trained += weighting.parameters()
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
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"the state in {folder} does not fit this model: {reason}") from error
    return counters


def load_average(folder: Path, model: torch.nn.Module, stage: str) -> None:
    """Load the averaged weights of a run into `model`: what is evaluated and exported."""
    require(folder / STATE, stage)
    tensors = _tensors(folder)
    weights = _part(tensors, "model.") | _part(tensors, "average.")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"the state in {folder} does not fit this model: {reason}") from error
