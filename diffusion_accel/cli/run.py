"""What `generate` does once everything is checked: load, switch features on, call, save."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import platform
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..denoisers import find_denoiser
from ..errors import ConfigurationError, ModelLoadError
from ..evaluation.compare import Comparison, compare
from ..evaluation.pictures import difference, grid, over
from ..pipelines.loading import load_lora, load_pipeline
from ..pipelines.models import ModelSource
from ..pipelines.schedulers import set_scheduler
from ..switchboard import accelerate
from .output import save_image
from .settings import Settings, split_lora
from .transparency import as_written, drawn_layers

_HASH_LIMIT = 2**29  # larger files are not hashed for the metadata


def best_device() -> str:
    """cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_machine(settings: Settings) -> str:
    """Refuse what this machine cannot do; returns the device to use. No model is loaded yet."""
    name = settings.device or best_device()
    try:
        kind = torch.device(name).type
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"--device {name} is not usable here; this machine's best is {best_device()}"
        ) from error
    if kind == "meta":
        raise ConfigurationError("--device meta computes nothing; use cpu, cuda or mps")
    if settings.dtype == "float16" and kind == "cpu":
        raise ConfigurationError("--dtype float16 is not usable on a CPU; use float32 or bfloat16")
    if settings.offload != "none" and kind == "cpu":
        raise ConfigurationError(
            f"--offload {settings.offload} needs an accelerator to move models to; this runs on cpu"
        )
    if settings.attention == "xformers" and kind != "cuda":
        raise ConfigurationError(f"--attention xformers runs on CUDA only, not on {kind}; use sdpa")
    return name


@dataclass
class Result:
    """What one prompt gave."""

    images: list[Image.Image]
    report: Any
    comparison: Comparison | None = None


class Session:
    """A loaded pipeline with its features, and how to call it."""

    def __init__(
        self, settings: Settings, source: ModelSource, device: str, quiet: bool = False, promptless: bool = False
    ) -> None:
        self.settings, self.source = settings, source
        self.layers = drawn_layers(settings)
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
        pipe = self._load(settings, device)
        self.parameters = inspect.signature(type(pipe).__call__).parameters
        if "prompt" not in self.parameters and not promptless:
            raise ModelLoadError(f"{type(pipe).__name__} takes no prompt; generate needs a text-to-image pipeline")
        pipe.set_progress_bar_config(disable=quiet or not sys.stderr.isatty(), leave=False)
        self.plain: Any = None  # what --compare compares a quantized model with
        if settings.compare and settings.quantize is not None:
            whole = dataclasses.replace(settings, quantize=None, runtime=None, low_memory=False)
            self.plain = accelerate(self._load(whole, device), *(f for f in settings.features.values() if f.redraws))
            self.plain.set_progress_bar_config(disable=True)
        self.pipe = accelerate(pipe, *settings.features.values())
        for name in self.pipe.acceleration.features:
            if name not in settings.features and not quiet:
                print(f"note: {name.replace('_', ' ')} is on: the model was trained with it", file=sys.stderr)
        self.hash = _model_hash(source)

    def _load(self, settings: Settings, device: str) -> Any:
        """The pipeline, where and how it runs, without features."""
        pipe = load_pipeline(
            self.source,
            task=settings.task,
            controlnet=settings.controlnet,
            dtype=getattr(torch, settings.dtype),
            allow_pickle=settings.allow_pickle,
            quantize=settings.quantize,
            runtime=settings.runtime,
            low_memory=settings.low_memory,
        )
        if settings.scheduler is not None:
            set_scheduler(pipe, settings.scheduler)
        self._load_loras(pipe)
        if settings.offload == "none":
            pipe.to(device)
        else:
            getattr(pipe, f"enable_{settings.offload}_cpu_offload")(device=device)
        if settings.attention == "xformers":
            pipe.enable_xformers_memory_efficient_attention()
        if settings.compile:
            (getattr(pipe, "unet", None) or pipe.transformer).compile_repeated_blocks()
        return pipe

    def _load_loras(self, pipe: Any) -> None:
        names, scales = [], []
        for number, entry in enumerate(self.settings.lora):
            file, scale = split_lora(entry)
            names.append(f"lora_{number}")
            scales.append(scale)
            load_lora(pipe, file, scale, names[-1])
        if names:
            pipe.set_adapters(names, scales)

    # ------------------------------------------------------------------ one prompt
    def generate(self, prompt: str, plan: Settings, seeds: list[int]) -> Result:
        """Call the pipeline (and, with --compare, plain diffusers as well)."""
        arguments = self._arguments(prompt, plan)
        self._note_long_prompt(prompt)

        # layers that are drawn together are pictures of one call, each from a seed of its own
        each = [(seed + (k << 40)) % (1 << 63) for seed in seeds for k in range(len(self.layers))]

        def call(pipe: Any) -> list[Image.Image]:
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in each]
            return pipe(**arguments, generator=generators, num_images_per_prompt=len(each)).images

        if plan.compare:
            comparison = compare(self.pipe, call, plain=self.plain)
            return Result(comparison.accelerated, comparison.report, comparison)
        return Result(call(self.pipe), self.pipe.acceleration.report())

    def draw(self, prompts: list[str], plan: Settings, generators: list[torch.Generator]) -> torch.Tensor:
        """One picture a prompt, (N, 3, H, W) in -1..1 on the CPU."""
        arguments = self._arguments("", plan) | {"prompt": prompts, "output_type": "pt"}
        return self.pipe(**arguments, generator=generators).images.float().cpu() * 2 - 1

    def fitted(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures (N, 3, h, w) resized to what this pipeline draws by default."""
        width = self.settings.width or self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        size = (self.settings.height or width, width)
        if tuple(pictures.shape[-2:]) == size:
            return pictures
        return torch.nn.functional.interpolate(pictures, size, mode="bilinear", antialias=True)

    def _arguments(self, prompt: str, plan: Settings) -> dict[str, Any]:
        wanted: dict[str, Any] = {
            "negative_prompt": plan.negative_prompt,
            "num_inference_steps": plan.steps,
            "guidance_scale": plan.guidance_scale,
            "width": plan.width,
            "height": plan.height,
            "strength": plan.strength,
        }
        if plan.image:
            wanted["image"] = _open(plan.image, "RGBA" if "transparent" in plan.features else "RGB", plan)
        if plan.mask_image:
            wanted["mask_image"] = _open(plan.mask_image, "L", plan)
        if plan.control_image:
            wanted["control_image" if plan.image else "image"] = _open(plan.control_image, "RGB", plan)
        given = {k: v for k, v in wanted.items() if v is not None}
        unknown = [k for k in given if k not in self.parameters and k not in ("width", "height")]
        if unknown:
            flags = ", ".join("--" + k.replace("_", "-") for k in unknown)
            raise ConfigurationError(f"{type(self.pipe).__name__} does not take {flags}")
        return {"prompt": prompt, **{k: v for k, v in given.items() if k in self.parameters}}

    def _note_long_prompt(self, prompt: str) -> None:
        tokenizer = getattr(self.pipe, "tokenizer", None)
        limit = getattr(tokenizer, "model_max_length", None)
        if tokenizer is not None and limit and limit < 10**6:
            length = len(tokenizer(prompt).input_ids)
            if length > limit:
                print(f"note: the prompt has {length} tokens; the model reads the first {limit}", file=sys.stderr)

    # ------------------------------------------------------------------ what is kept
    def save(self, image: Image.Image, path: Path, prompt: str, plan: Settings, seed: int, result: Result) -> None:
        """Write one image, with its metadata unless that is switched off."""
        image = as_written(image, plan)
        if not plan.metadata:
            return save_image(image, path)
        save_image(
            image,
            path,
            self._parameters_text(image, prompt, plan, seed, result),
            self._data(prompt, plan, seed, result),
        )

    def _parameters_text(self, image: Image.Image, prompt: str, plan: Settings, seed: int, result: Result) -> str:
        pairs = {
            "Steps": plan.steps or result.report.steps,
            "Sampler": type(self.pipe.scheduler).__name__.removesuffix("Scheduler"),
            "CFG scale": plan.guidance_scale,
            "Seed": seed,
            "Size": f"{image.width}x{image.height}",
            "Model hash": self.hash,
            "Model": self.source.name,
            "Denoising strength": plan.strength,
            "Accelerated by": "; ".join(map(str, plan.features.values())) or None,
            "Quantized": how_quantized(self.pipe),
            "Version": f"diffusion-accel {__version__}",
        }
        lines = [prompt]
        if plan.negative_prompt:
            lines.append(f"Negative prompt: {plan.negative_prompt}")
        lines.append(", ".join(f"{k}: {v}" for k, v in pairs.items() if v is not None))
        return "\n".join(lines)

    def _data(self, prompt: str, plan: Settings, seed: int, result: Result) -> dict[str, Any]:
        keys = "negative_prompt steps guidance_scale width height strength dtype lora quantize runtime".split()
        settings = {k: v for k in keys if (v := getattr(plan, k)) not in (None, ())}
        return {
            "prompt": prompt,
            "seed": seed,
            "model": self.source.name,
            "pipeline": type(self.pipe).__name__,
            "scheduler": type(self.pipe.scheduler).__name__,
            "settings": settings,
            "features": {n: f.to_dict() for n, f in plan.features.items()},
            "report": result.report.to_dict(),
            "versions": versions(),
        }

    def record(self, path: Path, prompt: str, seed: int, result: Result) -> dict[str, Any]:
        """The JSON line of one image."""
        line: dict[str, Any] = {
            "path": str(path),
            "prompt": prompt,
            "seed": seed,
            "seconds": round(result.report.seconds, 4),
        }
        line["report"] = result.report.to_dict()
        if result.comparison is not None:
            line["comparison"] = result.comparison.to_dict()
        return line

    def save_comparison(self, result: Result, prompt: str, path: Path) -> None:
        """One picture: plain, accelerated, and their difference."""
        c = result.comparison
        assert c is not None
        rows = [[a, b, difference(a, b)] for a, b in zip(c.baseline, c.accelerated, strict=True)]
        scale = max(1, 256 // rows[0][0].width)
        captions = [[f"{prompt}   PSNR {p:.1f} dB, SSIM {s:.3f}"] for p, s in zip(c.psnr, c.ssim, strict=True)]
        save_image(grid(rows, ["plain diffusers", "accelerated", "difference x4"], captions, scale), path)

    def print_summary(self, result: Result, compared: Path | None) -> None:
        """The report, and with --compare the table of what was gained and lost."""
        console = Console(highlight=False)
        console.print(str(result.report), markup=False, soft_wrap=True)
        quantized = how_quantized(self.pipe)
        if quantized:
            console.print(f"  {quantized}", markup=False, soft_wrap=True)
        c = result.comparison
        if c is None:
            return
        table = Table("time ratio", "FLOP ratio", "PSNR dB", "SSIM", title="against plain diffusers (1.00 = equal)")
        psnr, ssim = sorted(c.psnr)[len(c.psnr) // 2], sorted(c.ssim)[len(c.ssim) // 2]
        table.add_row(f"{c.time_ratio:.2f}", f"{c.flop_ratio:.2f}", f"{psnr:.1f}", f"{ssim:.3f}")
        console.print(table)
        console.print(f"side by side: {compared}", markup=False, soft_wrap=True)


def how_quantized(pipe: Any) -> str | None:
    """How many layers of the denoiser are quantized and what they compute with; None if it is not one of ours."""
    denoiser = find_denoiser(pipe)
    if denoiser is None or not getattr(denoiser, "is_quantized", False):
        return None
    from ..quant.model import runtime_report

    ways = Counter(runtime_report(denoiser).values())
    if not ways:
        return f"quantized with {denoiser.hf_quantizer.quantization_config.quant_method.value}"
    return f"quantized layers: {', '.join(f'{n} {way}' for way, n in ways.items())}"


def versions() -> dict[str, str]:
    """Versions of what made an image."""
    return {
        "diffusion-accel": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def _open(file: str, mode: str, plan: Settings) -> Image.Image:
    try:
        with Image.open(file) as image:
            transparent = image.mode in ("RGBA", "LA", "P") and mode == "RGB"
            opened = image.convert("RGBA") if transparent else image.convert(mode)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ConfigurationError(f"{file} is not an image that can be read") from error
    if opened.mode == "RGBA" and mode == "RGB":  # a transparent picture is seen on white
        opened = over(opened, (255, 255, 255))
    size = (plan.width or opened.width // 8 * 8, plan.height or opened.height // 8 * 8)
    if min(size) < 8:
        raise ConfigurationError(f"{file} is too small: {opened.width}x{opened.height} pixels")
    return opened if opened.size == size else opened.resize(size, Image.Resampling.LANCZOS)


def _model_hash(source: ModelSource) -> str | None:
    """The first ten hex digits of the SHA-256 of the denoiser's weights, as other tools write it."""
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
