"""Drawing a request with a pipeline: what its call is given, the seed of each image, and a comparison."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from diffusion_accel.conditioning import (
    CLASS,
    NOTHING,
    PROMPT,
    call_arguments,
    call_parameters,
    condition_of,
    missing_arguments,
    own_arguments,
)
from diffusion_accel.denoisers import find_controlnet
from diffusion_accel.errors import ConfigurationError, ModelLoadError, UnsupportedPipelineError
from diffusion_accel.hooks import model_of
from diffusion_accel.images import open_image
from diffusion_accel.measure.comparison import Comparison, compare_calls
from diffusion_accel.pipelines.ip_adapter import ip_adapters_of
from diffusion_accel.report import Report
from diffusion_accel.sizes import far_from_trained

from .clips import Clip, draws_clips
from .layers import drawn_layers
from .partial import Partial, shown_on_the_way
from .request import CALLED, Request, listed
from .texts import cut_text, weighted, why_no_weights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)
_USUAL = {"steps": "num_inference_steps", "strength": "strength"}  # fields whose defaults a pipeline's call names


@dataclass(frozen=True)
class Drawn:
    """What one request gave.

    Attributes:
        images: for each seed its layers, in turn; without layers one image, or one `Clip`.
        report: of the call.
        comparison: with the same images without the features, if that was asked for.
    """

    images: list[Any]
    report: Report
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Call:
    """A request that is ready to be drawn: its images are read, the pipeline takes all of it.

    Attributes:
        pipe: an accelerated pipeline.
        request: what is drawn.
        arguments: of the pipeline's call, besides the prompt and the generators.
    """

    pipe: DiffusionPipeline
    request: Request
    arguments: dict[str, Any]

    def notes(self) -> list[str]:
        """What is worth knowing before it is drawn: a size far from the trained one, a prompt that is cut."""
        found = [far_from_trained(self.pipe, *(self._start or (self.request.width, self.request.height)))]
        if not self.request.prompt_weights and condition_of(self.pipe) == PROMPT:
            found.append(cut_text(self.pipe, self.request.prompt))
            found.append(cut_text(self.pipe, self.request.negative_prompt or "", "negative prompt"))
        return [note for note in found if note]

    def images(self, pipe: DiffusionPipeline | None = None, **others: Any) -> list[Any]:
        """Draw images, or clips, with another pipeline if one is given, and `others` of the arguments of its call.

        Each image has a generator of its own, on the CPU: image k of a batch is the image of seed + k. Layers that
        are drawn together are images of one call, each from a seed of its own.
        """
        pipe = self.pipe if pipe is None else pipe
        layers = len(drawn_layers(self.pipe.acceleration.features))
        each = [(seed + (k << 40)) % (1 << 63) for seed in self.request.seeds for k in range(layers)]
        clips = draws_clips(pipe)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in each]
        if condition_of(pipe) == CLASS:
            given = call_arguments(pipe, [self.request.prompt] * len(each))
        else:
            given = {} if condition_of(pipe) == NOTHING else {"prompt": self.request.prompt}
            given |= {} if clips else {"num_images_per_prompt": len(each)}
        arguments = own_arguments(pipe, {**self.arguments, **others})
        if self.request.prompt_weights:
            del given["prompt"]
            given |= weighted(pipe, self.request.prompt, arguments.pop("negative_prompt", None))
        if clips:  # one by one: AnimateDiff makes no several, and one is large enough
            made = [pipe(**arguments, **given, generator=one, output_type="pil").frames[0] for one in generators]
            return [Clip(tuple(frames)) for frames in made]
        images: list[Any] = pipe(**arguments, **given, generator=generators).images  # or one array or tensor, as asked
        return images

    def draw(
        self,
        *,
        comparing: bool = False,
        plain: DiffusionPipeline | None = None,
        every: int | None = None,
        on_partial: Callable[[Partial], object] | None = None,
    ) -> Drawn:
        """Draw; with `comparing` also without the features that accelerate, or with `plain`; without it, `on_partial`
        is shown the images after `every` so many steps."""
        if comparing:
            comparison = compare_calls(self.pipe, self.images, plain=plain)
            return Drawn(comparison.accelerated, comparison.report, comparison)
        with ExitStack() as around:
            if every is not None and on_partial is not None:
                width, height = self._start or (self.arguments.get("width"), self.arguments.get("height"))
                around.enter_context(shown_on_the_way(self.pipe, every, (height, width), on_partial))
            images = self.images()
        return Drawn(images, self.pipe.acceleration.report())

    @property
    def _start(self) -> tuple[int, int] | None:
        """The size of the image that it starts from, or of what a ControlNet is given; None: neither says it."""
        start = self.arguments.get("image", self.arguments.get("control_image"))
        start = start[0] if isinstance(start, list) else start
        return start.size if isinstance(start, Image.Image) else None


def draw(
    pipe: DiffusionPipeline, request: Request, *, comparing: bool = False, plain: DiffusionPipeline | None = None
) -> Drawn:
    """Draw a request.

    Args:
        pipe: an accelerated pipeline (`accelerate(pipe)`, with or without features).
        request: what is drawn.
        comparing: draw it without the features that accelerate as well, and compare.
        plain: another pipeline to compare with: the same model before it was quantized.

    Raises:
        ConfigurationError: the pipeline does not take something that the request has.
        ModelLoadError: the pipeline is called with neither a prompt nor a class.
    """
    return prepare(pipe, request).draw(comparing=comparing, plain=plain)


def prepare(pipe: DiffusionPipeline, request: Request) -> Call:
    """A request as a call of this pipeline, with its images opened; see `draw`."""
    check_drawable(pipe)
    return Call(pipe, request, _arguments(pipe, request, opening=True))


def check_drawable(pipe: DiffusionPipeline) -> None:
    """Raise `ModelLoadError` for a pipeline that is called with neither a prompt nor a class."""
    if condition_of(pipe) == NOTHING and not (draws_clips(pipe) and "image" in call_parameters(pipe)):
        raise ModelLoadError(takes_neither(type(pipe)))


def takes_neither(cls: type) -> str:
    """The error about a pipeline class that is called with neither a prompt nor a class."""
    return f"{cls.__name__} takes neither a prompt nor a class, and nothing else says what to draw"


def check_requests(pipe: DiffusionPipeline, requests: Iterable[Request]) -> None:
    """Refuse what this pipeline cannot do for any of the requests, before the first image is drawn or file opened."""
    requests = list(requests)
    if condition_of(pipe) == CLASS:
        call_arguments(pipe, [request.prompt for request in requests])
    parameters = inspect.signature(type(pipe).__call__).parameters
    usual = {key: getattr(parameters.get(name), "default", None) for key, name in _USUAL.items()}
    known: dict[str, Any] = {key: value for key, value in usual.items() if isinstance(value, (int, float))}
    for request in requests:
        _arguments(pipe, request, opening=False)
        if request.prompt_weights and (reason := why_no_weights(pipe)):
            raise UnsupportedPipelineError(f"prompt_weights cannot be used on {type(pipe).__name__}: {reason}")
        if request.image:
            request.check_strength(**known)


def _arguments(pipe: DiffusionPipeline, request: Request, opening: bool = True) -> dict[str, Any]:
    parameters = inspect.signature(type(pipe).__call__).parameters
    wanted: dict[str, Any] = {call: getattr(request, name) for name, call in CALLED.items()}
    shown = ip_adapters_of(pipe)
    if request.ip_adapter_image and not shown:
        raise ConfigurationError(f"ip_adapter_image is for an IP-Adapter, and this {type(pipe).__name__} has none")
    if shown and not request.ip_adapter_image:
        raise ConfigurationError("ip_adapter_image is missing: the pipeline has an IP-Adapter")
    if shown > 1:
        raise ConfigurationError(
            f"ip_adapter_image is for one IP-Adapter, and the pipeline has {shown}: call it itself"
        )
    images: dict[str, tuple[str, Any, str]] = {
        "image": ("image", request.image, "RGBA" if "transparent" in pipe.acceleration.features else "RGB"),
        "mask_image": ("mask_image", request.mask_image, "L"),
        "control_image" if request.image or "control_image" in parameters else "image": (
            "control_image",
            request.control_image,
            "RGB",
        ),
    }
    for name, (what, file, mode) in images.items():
        if isinstance(file, tuple):
            wanted[name] = _open_all(file, mode, request, what) if opening else list(file)
        elif file:
            wanted[name] = _open(file, mode, request, what) if opening else file
    if request.ip_adapter_image:  # as large as it is: the image encoder has a size of its own
        file = request.ip_adapter_image
        wanted["ip_adapter_image"] = open_image(file, what="ip_adapter_image", background=_WHITE) if opening else file
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in wanted.items() if v is not None}
    resized = ("width", "height") if request.image else ()  # to them, before the pipeline gets it
    unknown = [k for k in given if k not in parameters and k not in resized]
    unknown += ["fps"] if request.fps is not None and not draws_clips(pipe) else []
    ours = {call: name for name, call in CALLED.items()}
    if unknown:
        names = ", ".join(ours.get(name, name) for name in unknown)
        raise ConfigurationError(f"{type(pipe).__name__} does not take {names}")
    if request.control_image or {"image", "control_image"} & parameters.keys():
        _check_control(pipe, request)
    if missing := missing_arguments(pipe, given):
        names = ", ".join(ours.get(name, name) for name in missing)
        raise ConfigurationError(f"{type(pipe).__name__} needs {names}")
    return {k: v for k, v in given.items() if k in parameters}


def _check_control(pipe: DiffusionPipeline, request: Request) -> None:
    """Refuse a number of images that is not that of the ControlNets, and ControlNets that read no colours."""
    if (net := find_controlnet(pipe)) is None:
        return
    nets = list(getattr(model_of(net), "nets", [model_of(net)]))
    count, images = len(nets), len(listed(request.control_image))
    if not images:
        raise ConfigurationError("control_image is needed: the pipeline has a ControlNet")
    for channels in (getattr(getattr(one, "config", None), "conditioning_channels", 3) for one in nets):
        if channels != 3:
            raise ConfigurationError(f"control_image has 3 channels, and a ControlNet of the pipeline takes {channels}")
    if count != images:
        raise ConfigurationError(
            f"control_image must be one for each of the pipeline's ControlNets, in their order: {count}, got {images}"
        )


def _open_all(files: Sequence[str | Path | Image.Image], mode: str, request: Request, what: str) -> list[Image.Image]:
    """Several images in the size that is drawn; where the request does not say it, in that of the first."""
    first, *others = files
    found = [_open(first, mode, request, what)]
    return found + [_open(file, mode, request, what, found[0].size) for file in others]


def _open(
    file: str | Path | Image.Image, mode: str, request: Request, what: str, size: tuple[int, int] | None = None
) -> Image.Image:
    """An image in the size that is drawn: transparency over white, of a mask over black."""
    opened = open_image(file, mode, what=what, background=_BLACK if mode == "L" else _WHITE)
    size = size or (request.width or opened.width // 8 * 8, request.height or opened.height // 8 * 8)
    if min(size) < 8:
        name = "" if isinstance(file, Image.Image) else f"{file} "
        raise ConfigurationError(f"{what} {name}is too small: {opened.width}x{opened.height} pixels")
    return opened if opened.size == size else opened.resize(size, Image.Resampling.LANCZOS)
