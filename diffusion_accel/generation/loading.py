"""Opening a pipeline: loaded, put where it runs, with its scheduler, LoRAs and features."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Feature
from diffusion_accel.model_files.names import ModelSource, find_model
from diffusion_accel.pipelines import ip_adapter as ip_adapters
from diffusion_accel.pipelines.loading import class_of, load_lora, load_pipeline
from diffusion_accel.pipelines.recipes import restore
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.switchboard import accelerate

from .request import IP_ADAPTER_SCALE

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusion_accel.recipes.recipe import Recipe

_HASH_LIMIT = 2**29  # larger files are not hashed for the metadata


def best_device() -> str:
    """cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def open_pipeline(
    model: str | ModelSource,
    *,
    features: Sequence[Feature] = (),
    scheduler: str | None = None,
    loras: Sequence[tuple[str, float]] = (),
    ip_adapter: str | Path | None = None,
    ip_adapter_scale: float | None = None,
    device: str | None = None,
    offload: str = "none",
    attention: str = "sdpa",
    recipe: Recipe | None = None,
    **options: Any,
) -> DiffusionPipeline:
    """Load a pipeline, put it where it runs, and switch features on.

    Args:
        model: an embedded name, a folder, a `.safetensors` file, or a hub id.
        features: what `accelerate` is given.
        scheduler: a short name or a diffusers class; None: the model's own.
        loras: files with their scales.
        ip_adapter: the `.safetensors` file of an IP-Adapter; the image encoder is the pipeline's, or in the folder
            `image_encoder` beside the file. Requests need an `ip_adapter_image`.
        ip_adapter_scale: how much that image counts, 0 to 2; None: 1.
        device: where it runs; None: the best one here.
        offload: "none", or "model" or "sequential": parts are on an accelerator only while they compute.
        attention: "sdpa", or "xformers" on CUDA.
        recipe: what it has beside features and a quantized denoiser, which are given here, is restored: its scheduler
            unless one is named. The model is checked against it.
        options: of `load_pipeline`: task, controlnet, dtype, quantize, …

    Raises:
        ConfigurationError, ModelLoadError, UnsupportedPipelineError, FeatureConflictError: with one line that says why.
    """
    if ip_adapter_scale is not None:
        if ip_adapter is None:
            raise ConfigurationError("ip_adapter_scale needs ip_adapter")
        IP_ADAPTER_SCALE.check(ip_adapter_scale, "ip_adapter_scale")
    source = model if isinstance(model, ModelSource) else find_model(model, bool(options.get("allow_pickle", False)))
    if ip_adapter is not None:
        ip_adapters.check_before(source, options.get("pipeline_class") or class_of(source), ip_adapter)
    pipe: Any = load_pipeline(source, **options)
    if recipe is not None:
        restore(pipe, recipe, source, quantize=options.get("quantize"), scheduler=scheduler is None)
    if scheduler is not None:
        set_scheduler(pipe, scheduler)
    names = [f"lora_{number}" for number in range(len(loras))]
    for name, (file, _) in zip(names, loras, strict=True):
        load_lora(pipe, file, name)
    if names:
        pipe.set_adapters(names, [scale for _, scale in loras])
    if ip_adapter is not None:
        ip_adapters.load_ip_adapter(pipe, ip_adapter, 1.0 if ip_adapter_scale is None else ip_adapter_scale)
    device = device or best_device()
    if offload == "none":
        pipe.to(device)
    else:
        getattr(pipe, f"enable_{offload}_cpu_offload")(device=device)
    if attention == "xformers":
        pipe.enable_xformers_memory_efficient_attention()
    return accelerate(pipe, *features)


def model_hash(source: ModelSource) -> str | None:
    """The first ten hex digits of the SHA-256 of the denoiser's weights, as other tools write it; None for models of
    the hub and large ones."""
    if source.kind == "hub":
        return None
    root = Path(source.location)
    files = (
        [root]
        if root.is_file()
        else sorted(root.glob("unet/*.safetensors")) + sorted(root.glob("transformer/*.safetensors"))
    )
    if not files or sum(f.stat().st_size for f in files) > _HASH_LIMIT:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:10]
