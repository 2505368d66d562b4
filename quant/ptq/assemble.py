"""What is put into the model: layers that can still be learnt at the beginning, quantized ones at the end; and the way
back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from diffusion_accel._version import __version__
from diffusion_accel.denoisers import getattr_path
from diffusion_accel.diffusers_compat import drop_config_entry, set_config_entry
from diffusion_accel.quant.loader import LowBitConfig, LowBitQuantizer
from diffusion_accel.quant.model import install, quantized_table, set_runtime, uninstall
from diffusion_accel.quant.model import tables as tables_of
from diffusion_accel.quant.spec import ModelSpec

from .bits import layer_specs
from .stage import Job, RunState, Stage, Values
from .trainable_layer import TrainableLayers


def _begin(state: RunState, _job: Job) -> Values:
    """Embedding tables are rounded to nearest before anything else, so that all errors are with them; the other layers
    get their grids."""
    specs = layer_specs(state.denoiser, state.allocated, state.needs, state.calibration.timesteps, state.scores or None)
    state.plain_tables = tables_of(state.denoiser)
    state.undo.callback(put, state.denoiser, state.plain_tables)
    state.tables = {name: quantized_table(table) for name, table in state.plain_tables.items()}
    put(state.denoiser, state.tables)
    state.trainable = TrainableLayers(state.denoiser, specs, state.calibration.timesteps, state.settings.search)
    state.undo.callback(state.trainable.restore)
    return {}


def _end(state: RunState, _job: Job) -> Values:
    """Put quantized layers in place of the trainable ones; the model is then what its checkpoint will be."""
    model: Any = state.denoiser
    made = {name: layer.finished(state.trainable.buckets) for name, layer in state.trainable.items()}
    made |= state.tables
    softmax_bits = state.settings.softmax_bits if state.settings.activation_bits else None
    tables = softmax_bits or any(layer.spec.has_tables for layer in made.values())
    timesteps = state.calibration.timesteps if tables else ()
    softmax = dict.fromkeys(state.peaks, softmax_bits) if softmax_bits else None
    spec = ModelSpec({n: m.spec for n, m in made.items()}, timesteps, softmax, _recipe(state))
    state.trainable.restore()
    state.trainable.clear()
    put(model, state.plain_tables)
    state.undo.callback(_forget, model)
    buckets = install(model, spec)
    for name, layer in made.items():
        layer.buckets = buckets
        model.set_submodule(name, layer)
    for name, peak in state.peaks.items():
        assert softmax_bits is not None
        scale = (peak / ((1 << softmax_bits) - 1)).clamp(min=1e-8)
        getattr_path(model, name).softmax_scale.copy_(scale[:, None])
    state.spec = spec
    config = LowBitConfig(spec, model)
    model.hf_quantizer = LowBitQuantizer(config)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    set_config_entry(model.config, "quantization_config", config)
    set_runtime(model, "simulated")
    model.eval()
    return {}


def _recipe(state: RunState) -> dict[str, Any]:
    """How the model was made, for the reader of its config."""
    s = state.settings
    return {
        "bits": s.name,
        "rounding": "nearest" if not state.plan["iterations"] else "adaround",
        "iterations": state.plan["iterations"],
        "finetune": "none" if "finetuned" not in state.validation else "quest",
        "time_epochs": state.plan["time_epochs"],
        "epochs": state.plan["epochs"],
        "layers": s.layers,
        "sensitive": s.sensitive,
        **({"search": state.search} if state.search else {}),
        "prompts": len(state.sampler.prompts),
        "steps": state.sampler.steps,
        "scheduler": type(state.sampler.pipe.scheduler).__name__,
        "error": {k: float(f"{v:.4g}") for k, v in state.validation.items()},
        "versions": {"diffusion-accel": __version__, "torch": torch.__version__},
    }


def put(model: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Put modules into a model, each at its name."""
    for name, part in parts.items():
        model.set_submodule(name, part)


def set_training(modules: Iterable[tuple[nn.Module, bool]]) -> None:
    """Give modules their modes, training or evaluation."""
    for module, training in modules:
        module.training = training


def _forget(model: Any) -> None:
    """Take off a model what makes it a quantized one for diffusers."""
    uninstall(model)
    for key in ("hf_quantizer", "quantization_method", "is_quantized", "low_bit_runtime"):
        model.__dict__.pop(key, None)
    drop_config_entry(model.config, "quantization_config")


TRAINABLE = Stage("", _begin)
QUANTIZED = Stage("", _end)
