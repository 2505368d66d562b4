"""`quantize=` when a pipeline is loaded: one of our checkpoints, or a quantizer that diffusers drives."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_accel import denoisers  # its names are loaded when they are used: this module needs no torch
from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.io import at_home, is_there, read_json
from diffusion_accel.model_files.folders import check_config
from diffusion_accel.model_files.quantized import METHOD

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ModelMixin

logger = logging.getLogger(__name__)

# by package, what may stand behind the colon
TORCHAO = {
    "int8wo": "Int8WeightOnlyConfig",
    "int4wo": "Int4WeightOnlyConfig",
    "int8da": "Int8DynamicActivationInt8WeightConfig",
    "float8wo": "Float8WeightOnlyConfig",
    "float8da": "Float8DynamicActivationFloat8WeightConfig",
}
BITSANDBYTES = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
QUANTO = ("int8", "int4", "int2", "float8")
PACKAGES = {"torchao": "torchao", "quanto": "optimum-quanto", "bitsandbytes": "bitsandbytes", "sdnq": "sdnq"}


def check_quantize(text: str) -> str:
    """Check a value of `quantize` as far as that is possible without importing anything; returns its kind: the name
    of a package, or "checkpoint".

    Raises:
        ConfigurationError: it is neither `PACKAGE:KIND` nor a folder.
        ModelLoadError: the folder is no checkpoint of ours.
    """
    package, colon, kind = text.partition(":")
    if colon and package in PACKAGES:
        known: Any = {"torchao": TORCHAO, "quanto": QUANTO, "bitsandbytes": BITSANDBYTES}.get(package)
        if (known is not None and kind not in known) or not kind:
            what = (
                ", ".join(f"{package}:{k}" for k in known) if known else "sdnq:int8, sdnq:uint4, … (its weight types)"
            )
            raise ConfigurationError(f"quantize {text}: unknown kind; {package} has {what}")
        return package
    if not is_there(text, "dir"):
        packages = ", ".join(f"{p}:…" for p in PACKAGES)
        raise ConfigurationError(
            f"quantize {text}: no such folder; give a checkpoint made by `diffusion-accel quantize`, or {packages} "
            "(torchao:int8wo for example)"
        )
    checkpoint_folder(text)
    return "checkpoint"


def checkpoint_folder(text: str) -> Path:
    """The first folder of `checkpoint_folders`."""
    return next(iter(checkpoint_folders(text).values()))


def checkpoint_folders(text: str) -> dict[str, Path]:
    """The folders of the denoisers in a quantized pipeline folder by their names, or the folder itself by the name "".

    Raises:
        ModelLoadError: there is none.
    """
    root, found = at_home(text), {}
    for file in (root / "config.json", *sorted(root.glob("*/config.json"))):
        try:
            config = read_json(file, error=ModelLoadError, nonfinite=True)
        except ModelLoadError:
            continue
        method = config.get("quantization_config") if isinstance(config, dict) else None
        if isinstance(method, dict) and method.get("quant_method") == METHOD:
            found["" if file.parent == root else file.parent.name] = file.parent
    if not found:
        raise ModelLoadError(f"{text} holds no checkpoint made by `diffusion-accel quantize`")
    return found


def foreign_config(text: str, parts: list[str]) -> Any:
    """diffusers' pipeline quantization config for `PACKAGE:KIND`, applied to the components `parts`.

    Raises:
        ModelLoadError: the package is not installed, or does not work here.
    """
    import diffusers  # heavy: diffusers
    from diffusers.quantizers.quantization_config import SDNQConfig  # heavy: diffusers

    package, _, kind = text.partition(":")
    try:
        if package == "torchao":
            import torchao.quantization as torchao  # optional package

            config: Any = diffusers.TorchAoConfig(getattr(torchao, TORCHAO[kind])())
        elif package == "quanto":
            import optimum.quanto  # noqa: F401 - optional package

            config = diffusers.QuantoConfig(weights_dtype=kind)
        elif package == "bitsandbytes":
            import bitsandbytes  # noqa: F401 - optional package

            config = diffusers.BitsAndBytesConfig(**BITSANDBYTES[kind])  # type: ignore[arg-type]
        else:
            config = SDNQConfig(weights_dtype=kind, quant_conv=True)
    except ImportError as error:
        raise ModelLoadError(f"quantize {text} needs {package}: pip install {PACKAGES[package]}") from error
    return diffusers.PipelineQuantizationConfig(quant_mapping=dict.fromkeys(parts, config))


def load_quantized(pipe: DiffusionPipeline, text: str, dtype: torch.dtype) -> None:
    """Give `pipe` the denoiser of one of our checkpoints in place of its own; of two, those that the folder has.

    Raises:
        ModelLoadError: the checkpoint is damaged, or of another kind of model.
    """
    parts, folders = denoisers.denoiser_names(pipe), checkpoint_folders(text)
    if not parts:
        raise ModelLoadError(f"{type(pipe).__name__} has no unet or transformer to take from {text}")
    if len(parts) == 1:
        folders = {parts[0]: next(iter(folders.values()))}
    elif not folders.keys() & {*parts}:
        raise ModelLoadError(
            f"{text} is one model, but {type(pipe).__name__} has {' and '.join(parts)}: give a folder in which the "
            "checkpoints have these names"
        )
    models = {part: _quantized(folders[part], text, getattr(pipe, part), dtype) for part in parts if part in folders}
    for part in parts:
        if part not in models:
            logger.warning("%s has no quantized %s: it stays as it is", text, part)
    pipe.register_modules(**models)


def _quantized(folder: Path, text: str, own: ModelMixin, dtype: torch.dtype) -> Any:
    """The model of a checkpoint, of the same kind as `own`."""
    config = read_json(folder / "config.json", error=ModelLoadError, nonfinite=True)
    check_config(config, folder / "config.json")
    name = config.get("_class_name")
    if name != type(own).__name__:
        raise ModelLoadError(f"{text} is a quantized {str(name)[:80]}; this pipeline needs a {type(own).__name__}")
    model = type(own).from_pretrained(str(folder), torch_dtype=dtype, local_files_only=True)
    for key in ("in_channels", "out_channels", "cross_attention_dim"):
        if getattr(model.config, key, None) != getattr(own.config, key, None):
            raise ModelLoadError(f"{text} does not fit this pipeline: its {key} is {getattr(model.config, key, None)}")
    return model
