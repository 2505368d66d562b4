"""A whole model made of quantized layers: putting them in, choosing how they compute, checking that they are whole."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from diffusion_accel.denoisers import find_denoisers
from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.hooks import forward_parameters, model_of
from diffusion_accel.model_files.quantized import RUNTIMES

from .affine import quantize, search_grid
from .attention import QuantizedSoftmax, quantizable_attention
from .buckets import Buckets, SelectBucket
from .kernels import make_runtime, products
from .layers import (
    QuantizedLayer,
    quantizable,
    quantizable_table,
    quantized_layers,
    quantized_like,
)
from .spec import LayerSpec, ModelSpec
from .stored import settings_digest, tensors_digest

# as safetensors names them
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TABLE_BITS = 8
_TABLES_MATTER = 0.01  # of the parameters


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that can be quantized, by name in the order of the model.

    Those of an IP-Adapter are left out: they are no part of the model's own folder.
    """
    added = (".processor.", "encoder_hid_proj.image_projection_layers.")
    modules = {name: module for name, module in model.named_modules() if quantizable(module)}
    return {name: module for name, module in modules.items() if not any(part in name for part in added)}


def tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """The embedding tables of a model by name, where they hold a share of its parameters that matters: those of the
    classes of a DiT can be half of it."""
    added = (".processor.", "encoder_hid_proj.image_projection_layers.")
    found = {n: m for n, m in model.named_modules() if quantizable_table(m) and not any(part in n for part in added)}
    size = sum(m.weight.numel() for m in found.values())
    whole = sum(p.numel() for p in model.parameters())
    return found if size >= _TABLES_MATTER * whole else {}  # type: ignore[return-value]


def quantized_table(table: nn.Embedding) -> QuantizedLayer:
    """A table with 8 bits a value and a grid for every row."""
    rows = table.weight.detach().float()
    scale, zero = search_grid(rows, TABLE_BITS, symmetric=True)
    made = quantized_like(table, LayerSpec(weight_bits=TABLE_BITS), Buckets(()))
    made.store(quantize(rows, scale, zero, TABLE_BITS), scale.T, zero.T)
    noise = (made.floats() - rows).square().sum().clamp(min=1e-30)
    made.forget()  # rows are unpacked when they are looked up
    sqnr = float(10 * torch.log10(rows.square().sum() / noise))
    made.spec = dataclasses.replace(made.spec, sqnr=round(sqnr, 2) if math.isfinite(sqnr) else None)
    return made


def install(model: nn.Module, spec: ModelSpec) -> Buckets:
    """Replace the layers that `spec` names by empty quantized ones (also on the meta device).

    Raises:
        ModelLoadError: the model has no such layer, or one that cannot be quantized.
    """
    buckets = Buckets(spec.timesteps)
    modules = dict(model.named_modules())
    for name, layer in spec.layers.items():
        module = modules.get(name)
        plain = not (
            layer.activation_bits or layer.output_bits or layer.split or layer.weight_group or layer.has_inner_weights
        )
        if module is None or not (quantizable(module) or (plain and quantizable_table(module))):
            what = "has no layer" if module is None else f"has a {type(module).__name__}, not a quantizable layer, at"
            raise ModelLoadError(f"the checkpoint does not fit the model: {type(model).__name__} {what} {name}")
        if layer.split >= module.weight.shape[1] and layer.split:  # type: ignore[union-attr,operator]
            raise ModelLoadError(
                f"the checkpoint does not fit the model: {name} has no {layer.split} channels to split"
            )
        if any(size % layer.input_group for size in layer.part_sizes(module.weight.shape[1]) if layer.input_group):  # type: ignore[union-attr,operator]
            raise ModelLoadError(
                f"the checkpoint does not fit the model: the channels of {name} are no multiple of {layer.input_group}"
            )
        if any(size % layer.rotate for size in layer.part_sizes(module.weight.shape[1]) if layer.rotate):  # type: ignore[union-attr,operator]
            raise ModelLoadError(
                f"the checkpoint does not fit the model: the channels of {name} cannot be rotated by {layer.rotate}"
            )
        model.set_submodule(name, quantized_like(module, layer, buckets))
    for name, bits in (spec.softmax or {}).items():
        module = modules.get(name)
        if module is None or not quantizable_attention(module):
            raise ModelLoadError(f"the checkpoint does not fit the model: {name} is no attention that can be quantized")
        QuantizedSoftmax.install(module, bits, buckets)
    if spec.timesteps:
        if "timestep" not in forward_parameters(model):
            raise ConfigurationError(f"{type(model).__name__} takes no timestep, so inputs cannot be quantized by it")
        SelectBucket.install(model, buckets)
    model._register_state_dict_hook(_with_shapes)
    return buckets


class StateDict(OrderedDict[str, torch.Tensor]):
    """What `state_dict()` of a quantized model returns: its tensors and nothing else. Asked for the weight of a
    quantized layer, which is none of them, it answers with zeros of that shape and no memory: diffusers looks there
    for the shapes of Flux's layers when it loads a LoRA."""

    def __init__(self, tensors: Any = (), likes: Mapping[str, torch.Tensor] | None = None) -> None:
        super().__init__(tensors)
        self.likes = likes or {}

    def __missing__(self, key: str) -> torch.Tensor:
        return self.likes[key]


def _with_shapes(model: nn.Module, tensors: Any, prefix: str, _metadata: object) -> StateDict:
    """The hook on `state_dict()`."""
    likes: dict[str, torch.Tensor] = {}
    for name, layer in quantized_layers(model).items():
        like = layer.weight_codes.new_zeros(()).expand(layer.weight_shape)
        likes |= dict.fromkeys((f"{prefix}{name}.weight", f"{prefix}{name.removesuffix('.base_layer')}.weight"), like)
    made = StateDict(tensors, likes)
    vars(made).update({key: value for key, value in vars(tensors).items() if key != "likes"})
    return made


def uninstall(model: nn.Module) -> None:
    """Take off what `install` put on a model besides its layers."""
    SelectBucket.uninstall(model)
    for key in [key for key, hook in model._state_dict_hooks.items() if hook is _with_shapes]:
        del model._state_dict_hooks[key]
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, QuantizedSoftmax):
            del module.softmax_scale
            module.set_processor(processor.before)  # type: ignore[operator]


def set_runtime(model: nn.Module, runtime: str = "auto", low_memory: bool = False) -> None:
    """Choose how the quantized layers of a model (or pipeline) compute.

    Args:
        model: a quantized model, or a pipeline with one.
        runtime: "dequantize": weights as floating-point numbers, inputs left as they are; "simulated": inputs
            rounded to their grids as well, in floating point; "integer": 8-bit integer products, where the layer and
            the machine can, "simulated" elsewhere; "bfloat16": as "dequantize", weights and inputs as bfloat16; "auto":
            of "integer", "bfloat16" and "dequantize" what is fastest for the layer on this kind of machine, by a rule;
            see `kernels.fastest`.
        low_memory: unpack weights at every call instead of keeping them as numbers.

    Raises:
        ConfigurationError: no such runtime, or nothing is quantized.
    """
    if runtime not in RUNTIMES:
        raise ConfigurationError(f"runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
    layers = [layer for one in _models(model) for layer in quantized_layers(one).values()]
    if not layers:
        raise ConfigurationError(f"{type(model).__name__} has no quantized layers")
    for layer in layers:
        layer.keep_floats = not low_memory
        layer.forget()
        layer.runtime = make_runtime(runtime, layer)
    # the processes of a job compare this: machines of two kinds would choose differently
    for one in _models(model):
        one.low_bit_runtime = runtime if runtime != "auto" else f"auto, {products('cpu')}"  # type: ignore[assignment]


def runtime_report(model: nn.Module) -> dict[str, str]:
    """What every quantized layer computes with, by name; of "auto" what it picked."""
    models = _models(model)
    prefixes = [f"{i}." if len(models) > 1 else "" for i in range(len(models))]
    found = {prefix: quantized_layers(one) for prefix, one in zip(prefixes, models, strict=True)}
    return {f"{prefix}{name}": layer.runtime.name for prefix, layers in found.items() for name, layer in layers.items()}


def computed_with(model: Any) -> dict[str, Any] | None:
    """The runtime of a quantized model (or pipeline) and how many layers compute with what; None if it is not ours."""
    counts = Counter(runtime_report(model).values())
    runtimes = [getattr(one, "low_bit_runtime", None) for one in _models(model)]
    return {"runtime": next(filter(None, runtimes), None), "layers": dict(counts)} if counts else None


def _models(model: Any) -> list[nn.Module]:
    """A model, or the denoisers of a pipeline."""
    found = [model_of(model)] if isinstance(model, nn.Module) else find_denoisers(model)
    if not found:
        raise ConfigurationError(f"expected a model or a pipeline with one, got {type(model).__name__}")
    return found


# ---------------------------------------------------------------------- integrity
def quantized_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the quantized layers and attentions that a checkpoint stores, by name in order."""
    for name, module in sorted(model.named_modules()):
        if isinstance(module, QuantizedLayer) or hasattr(module, "softmax_scale"):
            for key, tensor in sorted(module.named_buffers(recurse=False)):
                if not key.startswith("_"):
                    yield f"{name}.{key}", tensor


def digest_of_version_1(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the quantized tensors: what the first layout had."""
    found = hashlib.sha256()
    for name, tensor in quantized_tensors(model):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def digest(model: Any, spec: Mapping[str, Any]) -> str:
    """The digest of a model as it would be saved now; `spec` as it is written, see `stored`."""
    stored = ((n, DTYPES[t.dtype], tuple(t.shape), (_bytes(t),)) for n, t in model.state_dict().items())
    return settings_digest(model.config, spec) + tensors_digest(stored)


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
