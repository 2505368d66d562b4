"""Selective finetuning: the layers that suffer most learn, with the rest of the quantized model around them fixed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch

from diffusion_accel.denoisers import (
    FEED_FORWARD,
    QUERIES,
    SAMPLE_KEYS_VALUES,
    SELF_KEYS_VALUES,
    TIME_LAYERS,
    quantization_preset,
)

from .finetuner import Finetuner, batches
from .settings import FinetuneSettings
from .stage import Job, Part, RunState, Stage, Values

_MOMENTS = "moments/"  # before the names of Adam's tensors in the file
# which layers are finetuned, by model, as published; a model's family names one (denoisers.quantization_preset)
PRESETS: dict[str, tuple[str, ...]] = {
    "sd": (FEED_FORWARD,),
    "sdxl": (FEED_FORWARD, QUERIES),
    "lsun": (QUERIES, SAMPLE_KEYS_VALUES),
    "dit": (FEED_FORWARD, QUERIES, SELF_KEYS_VALUES),
}


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that one of the patterns matches whole."""
    found = [re.compile(p) for p in patterns]
    return [n for n in names if any(p.fullmatch(n) for p in found)]


def stage_one_epochs(settings: FinetuneSettings, number: int, timestep: float) -> int:
    """Epochs of stage 1 at one timestep."""
    first, early, late = settings.time_epochs
    return first if number == 0 else early if timestep > 300 else late


def chosen_layers(state: RunState) -> list[str]:
    """The layers whose weights stage 2 finetunes."""
    s, names = state.settings, list(state.trainable)
    if s.layers == "all":
        return names
    found = set()
    if s.layers != "measured":
        preset = quantization_preset(state.denoiser) if s.layers == "preset" else s.layers
        found.update(matching(names, PRESETS[preset]))
    by_need = sorted(names, key=lambda n: -(state.trainable[n].spec.sensitivity or 0.0))
    found.update(by_need[: round(s.sensitive * len(names))])
    return [n for n in names if n in found]


# ---------------------------------------------------------------------- the stage
def _finetune(state: RunState, job: Job) -> Values:
    """QuEST's two stages, from where an interrupted run kept its last position."""
    stage, at = job.kept["position"].tolist() if job.kept else (1, 0)
    if job.kept:
        _take(state, job.part, job.kept)
    if stage == 1:
        _time_embedding(state, job, at)
        at = 0
    moments = job.kept if stage == 2 else None
    return _chosen_layers(state, job, at, moments or {})


def _time_embedding(state: RunState, job: Job, at: int) -> None:
    """Stage 1: the layers of the time embedding, one timestep after the other from number `at` on."""
    f, count = state.settings.finetune, len(state.calibration.timesteps)
    assert f is not None
    times = matching(state.trainable, (TIME_LAYERS,))
    asked = replace(f, time_epochs=tuple(state.plan["time_epochs"]))
    for number in range(at, count):
        state.tell(f"time embedding: timestep {number + 1} of {count}", "finetuning")
        finetuner = Finetuner(
            state.denoiser, state.trainable, times, times, f.rate, f.scale_rate, f.layer_loss, f.moments
        )
        finetuner.visit(number)
        losses = []
        for epoch in range(stage_one_epochs(asked, number, state.calibration.timesteps[number])):
            for rows in batches(state.calibration, number, f.time_rows, f.batch, epoch):
                losses.append(finetuner.step(rows))
        finetuner.close()
        if losses:
            timestep = state.calibration.timesteps[number]
            state.log("time embedding", timestep=timestep, first=losses[0], last=losses[-1])
        job.save(partial(_values, state, 1, number + 1))


def _chosen_layers(state: RunState, job: Job, at: int, kept: Values) -> Values:
    """Stage 2: the chosen layers, epoch by epoch over all timesteps in random order, from place `at` on."""
    f, count = state.settings.finetune, len(state.calibration.timesteps)
    assert f is not None
    times = matching(state.trainable, (TIME_LAYERS,))
    others = [n for n in state.trainable if n not in times]
    finetuner = Finetuner(
        state.denoiser, state.trainable, chosen_layers(state), others, f.rate, f.scale_rate, f.layer_loss, f.moments
    )
    if moments := {k.removeprefix(_MOMENTS): v for k, v in kept.items() if k.startswith(_MOMENTS)}:
        finetuner.restore(moments)
    epochs, losses = state.plan["epochs"], list[float]()
    total = epochs * count
    for place in range(at, total):
        epoch, turn = divmod(place, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(state.settings.seed + epoch)).tolist()
        state.tell(f"finetuning: epoch {epoch + 1} of {epochs}", "finetuning", place / total)
        finetuner.visit(order[turn])
        finetuner.pace(0.5 * (1 + math.cos(math.pi * place / total)))
        for rows in batches(state.calibration, order[turn], f.rows, f.batch, place):
            losses.append(finetuner.step(rows))
        if turn == count - 1:
            state.log("finetuning", epoch=epoch + 1, loss=sum(losses) / len(losses))
            losses = []
        job.save(partial(_values, state, 2, place + 1, finetuner))
    finetuner.close()
    return _values(state, 2, total)


def _values(state: RunState, stage: int, at: int, finetuner: Finetuner | None = None) -> Values:
    """What has been learnt up to a position: grids, the weights that are layers' own, and Adam's moments."""
    tensors: Values = {"position": torch.tensor([stage, at])}
    for name, layer in state.trainable.items():
        for key in (*layer.grids(), "weight", "bias"):
            value = getattr(layer, key, None)
            if value is not None and (key not in ("weight", "bias") or getattr(value, "own", False)):
                tensors[f"{name}.{key}"] = value.detach().contiguous()
    if finetuner is not None:
        tensors |= {f"{_MOMENTS}{key}": value for key, value in finetuner.state().items()}
    return tensors


@torch.no_grad()
def _take(state: RunState, _part: Part, values: Values) -> None:
    for key, value in values.items():
        name, _, what = key.rpartition(".")
        if key == "position" or key.startswith(_MOMENTS):
            continue
        layer = state.trainable[name]
        if what == "weight":
            layer.own()
        getattr(layer, what).copy_(value)


def _complete(state: RunState, values: Values) -> bool:
    return values["position"].tolist() == [2, state.plan["epochs"] * len(state.calibration.timesteps)]


FINETUNING = Stage(
    "finetuning",
    _finetune,
    _take,
    "finetune.safetensors",
    wanted=lambda state: (
        state.settings.finetune is not None and state.plan["epochs"] + max(state.plan["time_epochs"]) > 0
    ),
    complete=_complete,
    error="finetuned",
    inputs=True,
)
