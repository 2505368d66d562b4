"""Keywords of loading: which ones there are, so that a mistyped one is refused instead of doing nothing."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusion_accel.arguments import nearest
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.model_files.names import ModelSource
from diffusion_accel.registry import FEATURES

#: what diffusers' `from_pretrained` and `from_single_file` take besides the components of a pipeline (a test compares)
HUB = frozenset({"cache_dir", "force_download", "local_files_only", "proxies", "revision", "token"})
PRETRAINED = HUB | frozenset(
    "custom_pipeline custom_revision device_map disable_mmap dtype load_connected_pipeline low_cpu_mem_usage "
    "max_memory offload_folder offload_state_dict output_loading_info provider provider_options "
    "quantization_config sess_options torch_dtype trust_remote_code use_flashpack use_onnx use_safetensors "
    "variant".split()
)
SINGLE_FILE = HUB | frozenset(
    "config disable_mmap dtype load_safety_checker original_config original_config_file torch_dtype "
    "use_safetensors".split()
)
CONVERSION = frozenset({"custom_pipeline", "custom_revision", "dtype", "torch_dtype", "trust_remote_code"})
OWN = frozenset("task controlnet dtype allow_pickle pipeline_class quantize runtime low_memory".split())


def components_of(cls: type) -> frozenset[str]:
    """The parts and settings that a pipeline class is made of."""
    return frozenset(inspect.signature(cls).parameters) - {"args", "kwargs"}


def check_keywords(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ConfigurationError` for keywords that are not known, naming the nearest one that is."""
    known = {*known, *FEATURES}
    unknown = sorted(set(given) - known)
    if not unknown:
        return
    near = nearest(unknown[0], known)
    hint = f"did you mean {near}?" if near else f"the features are: {', '.join(sorted(FEATURES))}"
    raise ConfigurationError(f"unknown argument or feature: {', '.join(unknown)}; {hint}")


def check_options(source: ModelSource, cls: type | None, options: dict[str, Any]) -> None:
    """Refuse keywords for loading `source` that neither diffusers nor its pipeline takes, before anything is loaded.

    Args:
        source: the model.
        cls: the diffusers class to load as; None: the model's own.
        options: the keywords.

    Raises:
        ConfigurationError: one of them is unknown, or a feature.
    """
    features = sorted(FEATURES.keys() & options)
    if features:
        raise ConfigurationError(
            f"load_pipeline loads plain pipelines, without {', '.join(features)}: use "
            "AcceleratedPipeline.from_pretrained, or accelerate(pipe, ...) afterwards"
        )
    taken = OWN | (SINGLE_FILE if source.kind == "file" else PRETRAINED)
    net = options.get("controlnet") is not None
    if (set(options) <= taken and not net) or options.get("custom_pipeline") is not None:
        return
    cls = cls or _class_of(source, options)
    if cls is None:
        return
    check_keywords(options, taken | components_of(cls))
    if net and "controlnet" not in components_of(cls):
        raise ConfigurationError(
            f"{cls.__name__} has no ControlNet: give its folder or hub id, and the pipeline is converted, or a "
            "pipeline_class that has one"
        )


def _class_of(source: ModelSource, options: dict[str, Any]) -> Any:
    """The pipeline class that a model names; None if it is none of diffusers'."""
    import diffusers  # heavy: diffusers

    if source.kind == "file":
        return diffusers.StableDiffusionXLPipeline  # takes what StableDiffusionPipeline takes, and more
    if source.kind == "hub":
        index = diffusers.DiffusionPipeline.load_config(
            source.location, **{k: v for k, v in options.items() if k in HUB}
        )
    else:
        index = json.loads((Path(source.location) / "model_index.json").read_text(encoding="utf-8"))
    name = index.get("_class_name")
    return getattr(diffusers, name, None) if isinstance(name, str) else None
