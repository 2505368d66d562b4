"""`quantize=` when a pipeline is loaded: one of our checkpoints, or a quantizer that diffusers drives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.io import at_home, is_there

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
        if known is not None and kind not in known or not kind:
            what = (
                ", ".join(f"{package}:{k}" for k in known) if known else "sdnq:int8, sdnq:uint4, … (its weight types)"
            )
            raise ConfigurationError(f"--quantize {text}: unknown kind; {package} has {what}")
        return package
    if not is_there(text, "dir"):
        packages = ", ".join(f"{p}:…" for p in PACKAGES)
        raise ConfigurationError(
            f"--quantize {text}: no such folder; give a checkpoint made by `diffusion-accel quantize`, or {packages} "
            "(torchao:int8wo for example)"
        )
    checkpoint_folder(text)
    return "checkpoint"


def checkpoint_folder(text: str) -> Path:
    """The folder of the denoiser in a quantized pipeline folder (or itself). Raises `ModelLoadError`."""
    root = at_home(text)
    for folder in (root, root / "unet", root / "transformer"):
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and config.get("quantization_config", {}).get("quant_method") == "diffusion_accel":
            return folder
    raise ModelLoadError(f"{text} holds no checkpoint made by `diffusion-accel quantize`")


def foreign_config(text: str, part: str) -> Any:
    """diffusers' pipeline quantization config for `PACKAGE:KIND`, applied to the component `part`.

    Raises:
        ModelLoadError: the package is not installed, or does not work here.
    """
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, QuantoConfig, TorchAoConfig
    from diffusers.quantizers.quantization_config import SDNQConfig

    package, _, kind = text.partition(":")
    try:
        if package == "torchao":
            import torchao.quantization as torchao

            config: Any = TorchAoConfig(getattr(torchao, TORCHAO[kind])())
        elif package == "quanto":
            import optimum.quanto  # noqa: F401

            config = QuantoConfig(weights_dtype=kind)
        elif package == "bitsandbytes":
            import bitsandbytes  # noqa: F401

            config = BitsAndBytesConfig(**BITSANDBYTES[kind])  # type: ignore[arg-type]
        else:
            config = SDNQConfig(weights_dtype=kind, quant_conv=True)
    except ImportError as error:
        raise ModelLoadError(f"--quantize {text} needs {package}: pip install {PACKAGES[package]}") from error
    return PipelineQuantizationConfig(quant_mapping={part: config})


def load_quantized(pipe: Any, text: str, dtype: Any) -> None:
    """Give `pipe` the denoiser of one of our checkpoints in place of its own.

    Raises:
        ModelLoadError: the checkpoint is damaged, or of another kind of model.
    """
    from diffusion_accel.denoisers import denoiser_name

    part = denoiser_name(pipe)
    if part is None:
        raise ModelLoadError(f"{type(pipe).__name__} has no unet or transformer to take from {text}")
    own = getattr(pipe, part)
    folder = checkpoint_folder(text)
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    if name != type(own).__name__:
        raise ModelLoadError(f"{text} is a quantized {name}; this pipeline needs a {type(own).__name__}")
    model = type(own).from_pretrained(str(folder), torch_dtype=dtype, local_files_only=True)
    for key in ("in_channels", "out_channels", "cross_attention_dim"):
        if getattr(model.config, key, None) != getattr(own.config, key, None):
            raise ModelLoadError(f"{text} does not fit this pipeline: its {key} is {getattr(model.config, key, None)}")
    pipe.register_modules(**{part: model})
