"""What is kept of a drawn image: the settings in its file, and the JSON line."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from PIL import Image

from diffusion_accel import __version__
from diffusion_accel.denoisers import find_denoisers
from diffusion_accel.image_metadata import names_only, parameters_text, whole_path
from diffusion_accel.pipelines.schedulers import is_file
from diffusion_accel.quant.model import computed_with

from .clips import Clip
from .drawing import Drawn
from .request import CALLED, FILES, IMAGES, Request

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusion_accel.feature import Feature


_FILES = (*FILES, "quantize")  # settings that may name one


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What draws the images, as their metadata name it.

    Attributes:
        pipe: the accelerated pipeline.
        model: its name.
        model_hash: see `loading.model_hash`.
        features: those that were asked for, by name.
        settings: how it was loaded, by the names of flags; None, () and False are left out.
        scheduler: that drew; None: the pipeline's own.
        whole_paths: write whole paths of local files; otherwise their names only.
    """

    pipe: DiffusionPipeline
    model: str
    model_hash: str | None = None
    features: Mapping[str, Feature] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Any = None
    whole_paths: bool = False

    @property
    def _sampler(self) -> str:
        return type(self.pipe.scheduler if self.scheduler is None else self.scheduler).__name__

    def text(self, request: Request, seed: int, drawn: Drawn, size: tuple[int, int]) -> str:
        """The settings of one image of so many pixels for other tools, in the form of AUTOMATIC1111's web UI."""
        features = [f.described({} if self.whole_paths else names_only(f.to_dict())) for f in self.features.values()]
        pairs = {
            "Steps": request.steps or drawn.report.steps,
            "Sampler": self._sampler.removesuffix("Scheduler"),
            "CFG scale": request.guidance_scale,
            "Seed": seed,
            "Size": f"{size[0]}x{size[1]}",
            "Model hash": self.model_hash,
            "Model": self.model,
            "Denoising strength": request.strength,
            "Accelerated by": "; ".join(features) or None,
            "Quantized": how_quantized(self.pipe),
            "Version": f"diffusion-accel {__version__}",
        }
        return parameters_text(request.prompt, request.negative_prompt, pairs)

    def _whole_of(self, name: str, key: str, value: Any) -> Any:
        names_file = self.features[name].file_test(key)
        return whole_path(value) if names_file and isinstance(value, str) and names_file(value) else value

    def data(self, request: Request, seed: int, drawn: Drawn) -> dict[str, Any]:
        """Everything about one image, as JSON values."""
        own = (*IMAGES, "prompt_weights", "fps")
        values = {key: getattr(request, key) for key in (*CALLED, *own)}
        values |= self.settings
        settings = {k: _named(v) for k, v in values.items() if v is not None and v != () and v is not False}
        features = {n: f.to_dict() for n, f in self.features.items()}
        if self.whole_paths:
            settings = {k: _whole(k, v) for k, v in settings.items()}
            features = {n: {k: self._whole_of(n, k, v) for k, v in each.items()} for n, each in features.items()}
        data = {
            "prompt": request.prompt,
            "seed": seed,
            "model": self.model,
            "model_hash": self.model_hash,
            "pipeline": type(self.pipe).__name__,
            "scheduler": self._sampler,
            "settings": settings,
            "features": features,
            "report": drawn.report.to_dict(),
            "versions": versions(),
        }
        if request.count > 1 and not isinstance(drawn.images[0], Clip):  # each clip is a call of its own
            data["together"] = [seed - request.seed, request.count]
        if (ways := low_bit_ways(self.pipe)) is not None:
            data["quantized"] = ways
        return data if self.whole_paths else names_only(data)


def _whole(key: str, value: Any) -> Any:
    """A setting with whole paths of local files."""
    if isinstance(value, list | tuple):
        return [whole_path(one) for one in value] if key in ("lora", *_FILES) else value
    named = (key in _FILES and value not in ("on", "off")) or (key == "scheduler" and is_file(value))
    return whole_path(value) if named and isinstance(value, str) else value


def record(path: Path, request: Request, seed: int, drawn: Drawn) -> dict[str, Any]:
    """The JSON line of one image file."""
    line: dict[str, Any] = {
        "path": str(path),
        "prompt": request.prompt,
        "seed": seed,
        "seconds": round(drawn.report.seconds, 4),
    }
    line["report"] = drawn.report.to_dict()
    if drawn.comparison is not None:
        line["comparison"] = drawn.comparison.to_dict()
    return line


def how_quantized(pipe: Any) -> str | None:
    """How many layers of the denoisers are quantized and what they compute with; None if it is a plain model."""
    quantized: list[Any] = [d for d in find_denoisers(pipe) if getattr(d, "is_quantized", False)]
    if not quantized:
        return None
    ways = low_bit_ways(pipe)
    if ways is None:
        return f"quantized with {quantized[0].hf_quantizer.quantization_config.quant_method.value}"
    return f"quantized layers: {', '.join(f'{n} {way}' for way, n in ways['layers'].items())}"


def _named(value: Any) -> Any:
    """A setting as a JSON value: of an image that is no file its size."""
    if isinstance(value, tuple):
        return [_named(one) for one in value]
    if isinstance(value, Image.Image):
        return f"{value.width}x{value.height} pixels"
    return str(value) if isinstance(value, Path) else value


def low_bit_ways(pipe: Any) -> dict[str, Any] | None:
    """The runtime of the denoisers and how many layers compute with what; None if none is a quantized one of ours."""
    if not any(getattr(denoiser, "is_quantized", False) for denoiser in find_denoisers(pipe)):
        return None
    return computed_with(pipe)


def versions() -> dict[str, str]:
    """Versions of what made an image."""
    return {
        "diffusion-accel": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
