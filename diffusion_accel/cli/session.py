"""What `generate` does once everything is checked: load, switch features on, call, save."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from rich.table import Table

from diffusion_accel import __version__
from diffusion_accel.conditioning import CLASS, NOTHING, call_arguments, condition_of
from diffusion_accel.denoisers import find_denoisers
from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.images import open_image
from diffusion_accel.io import printable
from diffusion_accel.measure.comparison import Comparison, compare
from diffusion_accel.measure.grids import difference, grid
from diffusion_accel.model_files.names import ModelSource, pipeline_name
from diffusion_accel.pipelines.loading import load_lora, load_pipeline
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.pipelines.sizes import far_from_trained
from diffusion_accel.switchboard import accelerate

from .image_metadata import names_only, parameters_text
from .output import save_image
from .settings import Settings, check_strength, split_lora
from .terminal import console, note, say
from .transparency import as_written, drawn_layers

_HASH_LIMIT = 2**29  # larger files are not hashed for the metadata
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)
_USUAL = {"steps": "num_inference_steps", "strength": "strength"}  # settings whose defaults a pipeline's call names


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


def check_takes(source: ModelSource, classes: list[str]) -> None:
    """Refuse a pipeline that is called with neither a prompt nor a class, and classes for one that takes prompts; as
    far as a local folder tells before it is loaded."""
    cls = getattr(diffusers, pipeline_name(source) or "", None)
    if cls is None:
        return
    parameters = inspect.signature(cls.__call__).parameters
    if "prompt" not in parameters and "class_labels" not in parameters:
        raise ModelLoadError(takes_neither(cls))
    if classes and "class_labels" not in parameters:
        raise ConfigurationError(f"--class is for models of classes; {cls.__name__} takes a prompt")


def takes_neither(cls: type) -> str:
    return f"{cls.__name__} takes neither a prompt nor a class; generate and evaluate need a pipeline that does"


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
        self.condition = condition_of(pipe)
        if self.condition == NOTHING and not promptless:
            raise ModelLoadError(takes_neither(type(pipe)))
        pipe.set_progress_bar_config(disable=quiet or not sys.stderr.isatty(), leave=False)
        self.plain: Any = None  # what --compare compares a quantized model with
        if settings.compare and settings.quantize is not None:
            whole = dataclasses.replace(settings, quantize=None, runtime=None, low_memory=False)
            self.plain = accelerate(
                self._load(whole, device), *(f for f in settings.features.values() if f.changes_output)
            )
            self.plain.set_progress_bar_config(disable=True)
        self.pipe = accelerate(pipe, *settings.features.values())
        for name in self.pipe.acceleration.features:
            if name not in settings.features and not quiet:
                note(f"{name.replace('_', ' ')} is on: the model was trained with it")
        self.hash = _model_hash(source)
        self._sizes: set[tuple[int | None, int | None]] = set()  # those that were already looked at
        if settings.image is None:
            self._note_size(settings.width, settings.height)

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
            for denoiser in find_denoisers(pipe):
                denoiser.compile_repeated_blocks()  # type: ignore[operator]
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
    def check(self, texts: list[str], plans: list[Settings]) -> None:
        """Refuse what this pipeline cannot do for any of the prompts or classes, before the first image is drawn."""
        if self.condition == CLASS:
            call_arguments(self.pipe, texts)
        for plan in {repr(dataclasses.replace(plan, seed=None)): plan for plan in plans}.values():
            self._arguments(plan, opening=False)
            usual = {k: getattr(self.parameters.get(name), "default", None) for k, name in _USUAL.items()}
            known: dict[str, Any] = {
                k: v for k, v in usual.items() if getattr(plan, k) is None and isinstance(v, (int, float))
            }
            if plan.image:
                check_strength(dataclasses.replace(plan, **known))

    def generate(self, prompt: str, plan: Settings, seeds: list[int]) -> Result:
        """Call the pipeline (and, with --compare, plain diffusers as well)."""
        arguments = self._arguments(plan)
        start = arguments.get("image")
        self._note_size(*(start.size if isinstance(start, Image.Image) else (plan.width, plan.height)))
        self._note_long_prompt(prompt)

        # layers that are drawn together are images of one call, each from a seed of its own
        each = [(seed + (k << 40)) % (1 << 63) for seed in seeds for k in range(len(self.layers))]

        def call(pipe: Any) -> list[Image.Image]:
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in each]
            if self.condition == CLASS:
                return pipe(**arguments, **call_arguments(pipe, [prompt] * len(each)), generator=generators).images
            given = {**arguments, "prompt": prompt, "num_images_per_prompt": len(each)}
            return pipe(**given, generator=generators).images

        if plan.compare:
            comparison = compare(self.pipe, call, plain=self.plain)
            return Result(comparison.accelerated, comparison.report, comparison)
        return Result(call(self.pipe), self.pipe.acceleration.report())

    def draw(self, prompts: list[str], plan: Settings, generators: list[torch.Generator]) -> torch.Tensor:
        """One image a prompt, (N, 3, H, W) in -1..1 on the CPU."""
        arguments = self._arguments(plan) | call_arguments(self.pipe, prompts) | {"output_type": "pt"}
        return self.pipe(**arguments, generator=generators).images.float().cpu() * 2 - 1

    def fitted(self, pictures: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, h, w) resized to what this pipeline draws by default."""
        width = self.settings.width or self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        size = (self.settings.height or width, width)
        if tuple(pictures.shape[-2:]) == size:
            return pictures
        return torch.nn.functional.interpolate(pictures, size, mode="bilinear", antialias=True)

    def _arguments(self, plan: Settings, opening: bool = True) -> dict[str, Any]:
        wanted: dict[str, Any] = {
            "negative_prompt": plan.negative_prompt,
            "num_inference_steps": plan.steps,
            "guidance_scale": plan.guidance_scale,
            "width": plan.width,
            "height": plan.height,
            "strength": plan.strength,
        }
        images = {
            "image": ("--image", plan.image, "RGBA" if "transparent" in plan.features else "RGB"),
            "mask_image": ("--mask-image", plan.mask_image, "L"),
            "control_image" if plan.image else "image": ("--control-image", plan.control_image, "RGB"),
        }
        for name, (flag, file, mode) in images.items():
            if file:
                wanted[name] = _open(file, mode, plan, flag) if opening else file
        given = {k: v for k, v in wanted.items() if v is not None}
        resized = ("width", "height") if plan.image else ()  # to them, before the pipeline gets it
        unknown = [k for k in given if k not in self.parameters and k not in resized]
        if unknown:
            flags = ", ".join("--" + k.replace("_", "-") for k in unknown)
            raise ConfigurationError(f"{type(self.pipe).__name__} does not take {flags}")
        return {k: v for k, v in given.items() if k in self.parameters}

    def _note_long_prompt(self, prompt: str) -> None:
        tokenizer = getattr(self.pipe, "tokenizer", None)
        limit = getattr(tokenizer, "model_max_length", None)
        if tokenizer is not None and limit and limit < 10**6:
            length = len(tokenizer(prompt).input_ids)
            if length > limit:
                note(f"the prompt has {length} tokens; the model reads the first {limit}")

    def _note_size(self, width: int | None, height: int | None) -> None:
        """Say, once a size, that it is far from what the model was trained for."""
        words = far_from_trained(self.pipe, width, height) if (width, height) not in self._sizes else None
        self._sizes.add((width, height))
        if words:
            note(words)

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
        features = [f.described({} if plan.paths else names_only(f.to_dict())) for f in plan.features.values()]
        pairs = {
            "Steps": plan.steps or result.report.steps,
            "Sampler": type(self.pipe.scheduler).__name__.removesuffix("Scheduler"),
            "CFG scale": plan.guidance_scale,
            "Seed": seed,
            "Size": f"{image.width}x{image.height}",
            "Model hash": self.hash,
            "Model": self.source.name,
            "Denoising strength": plan.strength,
            "Accelerated by": "; ".join(features) or None,
            "Quantized": how_quantized(self.pipe),
            "Version": f"diffusion-accel {__version__}",
        }
        return parameters_text(prompt, plan.negative_prompt, pairs)

    def _data(self, prompt: str, plan: Settings, seed: int, result: Result) -> dict[str, Any]:
        keys = "negative_prompt steps guidance_scale width height strength dtype lora quantize runtime".split()
        keys += ["image", "mask_image", "controlnet", "control_image"]
        settings = {k: v for k in keys if (v := getattr(plan, k)) not in (None, ())}
        data = {
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
        if (ways := low_bit_ways(self.pipe)) is not None:
            data["quantized"] = ways
        return data if plan.paths else names_only(data)

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
        """One image: plain, accelerated, and their difference."""
        c = result.comparison
        assert c is not None
        rows = [[a, b, difference(a, b)] for a, b in zip(c.baseline, c.accelerated, strict=True)]
        scale = max(1, 256 // rows[0][0].width)
        shown = printable(prompt)  # a caption is one line, and no longer than anybody reads
        shown = shown if len(shown) <= 100 else f"{shown[:99]}…"
        captions = [[f"{shown}   PSNR {p:.1f} dB, SSIM {s:.3f}"] for p, s in zip(c.psnr, c.ssim, strict=True)]
        save_image(grid(rows, ["plain diffusers", "accelerated", "difference x4"], captions, scale), path)

    def print_summary(self, result: Result, compared: Path | None) -> None:
        """The report, and with --compare the table of what was gained and lost."""
        say(result.report, lines=True)
        quantized = how_quantized(self.pipe)
        if quantized:
            say(f"  {quantized}")
        c = result.comparison
        if c is None:
            return
        table = Table("time ratio", "FLOP ratio", "PSNR dB", "SSIM", title="against plain diffusers (1.00 = equal)")
        psnr, ssim = sorted(c.psnr)[len(c.psnr) // 2], sorted(c.ssim)[len(c.ssim) // 2]
        table.add_row(f"{c.time_ratio:.2f}", f"{c.flop_ratio:.2f}", f"{psnr:.1f}", f"{ssim:.3f}")
        console().print(table)
        say(f"side by side: {compared}")


def how_quantized(pipe: Any) -> str | None:
    """How many layers of the denoisers are quantized and what they compute with; None if it is a plain model."""
    quantized: list[Any] = [d for d in find_denoisers(pipe) if getattr(d, "is_quantized", False)]
    if not quantized:
        return None
    ways = low_bit_ways(pipe)
    if ways is None:
        return f"quantized with {quantized[0].hf_quantizer.quantization_config.quant_method.value}"
    return f"quantized layers: {', '.join(f'{n} {way}' for way, n in ways['layers'].items())}"


def low_bit_ways(pipe: Any) -> dict[str, Any] | None:
    """The runtime of the denoisers and how many layers compute with what; None if none is a quantized one of ours."""
    if not any(getattr(denoiser, "is_quantized", False) for denoiser in find_denoisers(pipe)):
        return None
    from diffusion_accel.quant.model import computed_with

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


def _open(file: str, mode: str, plan: Settings, flag: str) -> Image.Image:
    """An image file in the size that is drawn: transparency over white, of a mask over black."""
    opened = open_image(file, mode, what=flag, background=_BLACK if mode == "L" else _WHITE)
    size = (plan.width or opened.width // 8 * 8, plan.height or opened.height // 8 * 8)
    if min(size) < 8:
        raise ConfigurationError(f"{flag} {file} is too small: {opened.width}x{opened.height} pixels")
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
