"""The denoisers that the generic trainer can build, and the pipelines they are saved as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMPipeline, DiTPipeline, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion_accel.conditioning import keep_class_names
from diffusion_accel.io import first_line
from diffusion_accel.outputs import replacing_folder

from .denoising import Process
from .files import TrainingError, UsageError
from .sampling import scheduler_for

MODELS = ("unet", "unet-text", "dit")
DIT_EMPTY = 1000  # the empty class of diffusers' DiTPipeline


def default_config(kind: str, size: int, channels: int, classes: int, text_width: int) -> dict[str, Any]:
    """The configuration of a small model for images or latents of a side of `size` with `channels`.

    "unet": UNet2DModel (with a class embedding if there are classes), "unet-text": UNet2DConditionModel, "dit":
    DiTTransformer2DModel. Any value can be changed by a file of the user's.
    """
    shape = {"sample_size": size, "in_channels": channels, "out_channels": channels}
    if kind == "unet":
        config = shape | {
            "block_out_channels": [64, 128, 192],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": 32,
            "norm_num_groups": 16,
        }
        return config | ({"num_class_embeds": classes + 1} if classes else {})
    if kind == "unet-text":
        return shape | {
            "block_out_channels": [64, 128, 192],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": text_width,
            "attention_head_dim": 4,
            "norm_num_groups": 16,
            "use_linear_projection": True,
        }
    if kind == "dit":
        return shape | {
            "num_layers": 8,
            "num_attention_heads": 6,
            "attention_head_dim": 32,
            "patch_size": 2,
            "num_embeds_ada_norm": DIT_EMPTY,
        }
    raise UsageError(f"unknown model {kind!r}; the models are: {', '.join(MODELS)}")


def build_denoiser(kind: str, config: dict[str, Any]) -> Any:
    """The diffusers model of a kind. Raises `UsageError` if the configuration does not fit."""
    names = {"unet": "UNet2DModel", "unet-text": "UNet2DConditionModel", "dit": "DiTTransformer2DModel"}
    cls: Any = getattr(diffusers, names[kind])
    unknown = sorted(set(config) - set(cls._get_init_keys(cls)))
    if unknown:
        raise UsageError(f"{names[kind]} has no setting {', '.join(unknown)}")
    try:
        return cls(**config)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UsageError(f"{names[kind]} cannot be built so: {first_line(error)}") from error


def build_pipeline(model: Any, process: Process, vae: Any, text: Any, tokenizer: Any, classes: list[str]) -> Any:
    """The diffusers pipeline that these parts make, or None where diffusers has none.

    UNet2DModel on pixels without classes: DDIMPipeline; UNet2DConditionModel with a VAE: StableDiffusionPipeline; DiT
    with a VAE: DiTPipeline. They take epsilon and v-prediction, not flow.
    """
    name, scheduler = type(model).__name__, scheduler_for(process)
    if process.prediction == "flow":
        return None
    if name == "UNet2DModel" and vae is None and not classes:
        return DDIMPipeline(model, scheduler)
    if name == "UNet2DConditionModel" and vae is not None and text is not None:
        parts = {"vae": vae, "text_encoder": text, "tokenizer": tokenizer, "unet": model, "scheduler": scheduler}
        optional = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(**parts, **optional)
    if name == "DiTTransformer2DModel" and vae is not None and classes:
        pipeline = DiTPipeline(model, vae, scheduler, id2label=dict(enumerate(classes)))
        keep_class_names(pipeline)
        return pipeline
    return None


def save_trained(
    out: Path, model: Any, process: Process, vae: Any, text: Any, tokenizer: Any, classes: list[str], half: bool
) -> str:
    """Write a pipeline folder, or else the single parts in a folder of the same layout; returns what it is."""
    pipeline = build_pipeline(model, process, vae, text, tokenizer, classes)
    with replacing_folder(out) as folder:
        if pipeline is not None:
            if half:
                pipeline.to(dtype=torch.float16)
            pipeline.save_pretrained(folder, safe_serialization=True)
            float32_text(folder)
            return type(pipeline).__name__
        part = "unet" if "UNet" in type(model).__name__ else "transformer"
        (model.half() if half else model).save_pretrained(folder / part, safe_serialization=True)
        scheduler_for(process).save_pretrained(folder / "scheduler")
        if text is not None:
            text.save_pretrained(folder / "text_encoder", safe_serialization=True)
            tokenizer.save_pretrained(folder / "tokenizer")
        if vae is not None:
            vae.save_pretrained(folder / "vae", safe_serialization=True)
        return f"{type(model).__name__} without a pipeline"


def float32_text(folder: Path) -> None:
    """Let the text encoders load as float32: transformers follows their configs, diffusers' models are float32."""
    for file in folder.glob("text_encoder*/config.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        values.pop("torch_dtype", None)
        file.write_text(json.dumps(values | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def load_vae(path: Path) -> Any:
    """An AutoencoderKL from its own folder or a pipeline folder."""
    return _load(AutoencoderKL, path / "vae" if (path / "vae").is_dir() else path)


def load_text(path: Path) -> tuple[Any, Any]:
    """Text encoder and tokenizer of a pipeline folder."""
    encoder = _load(CLIPTextModel, path / "text_encoder")
    return encoder.float(), _load(CLIPTokenizer, path / "tokenizer")


def _load(cls: Any, path: Path) -> Any:
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder")
    try:
        return cls.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainingError(f"{path} cannot be loaded: {first_line(error)}") from error
