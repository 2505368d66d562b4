"""What is drawn: one prompt with everything that a call of the pipeline needs, checked when it is made."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_accel.arguments import by_name
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

MAX_SEED = 2**63 - 1
MAX_TEXT = 1_000_000  # characters of a prompt
MAX_IMAGES = 10_000  # of one request, or one command


@dataclass(frozen=True)
class Bounds:
    """What a number may be: a test (`value in bounds`), and in words.

    Attributes:
        low, high: the least and the greatest number.
        words: what is allowed, behind "must be".
        step: of which it must be a multiple; 0: of nothing.
        whole: whether it is a whole number.
    """

    low: float
    high: float
    words: str
    step: int = 0
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        return self.low <= value <= self.high and (not self.step or value % self.step == 0)  # False for nan

    def allowed(self, value: Any) -> str:
        """The words for an error about `value`: without the upper end where it is only too low."""
        if self.whole and isinstance(value, float):
            return "a whole number"
        low = isinstance(value, (int, float)) and not self.step and value < self.low
        return self.words.partition(" and at most ")[0] if low else self.words

    def check(self, value: Any, name: str) -> None:
        """Raise `ConfigurationError` for a value of that name that is none of these."""
        if value not in self:
            raise ConfigurationError(f"{name} must be {self.allowed(value)}, got {shown(value)}")

    @property
    def short(self) -> str:
        """For the help: `1 to 100`."""
        return f"{self.low:.10g} to {self.high:.10g}" + (f", a multiple of {self.step}" if self.step else "")


def at_least(low: int, high: int) -> Bounds:
    """Whole numbers from `low` to `high`."""
    return Bounds(low, high, f"at least {low} and at most {high}", whole=True)


_SIZE = Bounds(8, 32_768, "a positive multiple of 8 and at most 32768", 8, whole=True)
IP_ADAPTER_SCALE = Bounds(0, 2, "at least 0 and at most 2")
_SHARE = Bounds(0, 1, "at least 0 and at most 1")
LIMITS: dict[str, Bounds] = {
    "width": _SIZE,
    "height": _SIZE,
    "steps": at_least(1, 10_000),
    "count": at_least(1, MAX_IMAGES),
    "guidance_scale": Bounds(0, 1000, "a finite number of at least 0 and at most 1000"),
    "strength": Bounds(math.ulp(0), 1, "above 0 and at most 1"),
    "controlnet_conditioning_scale": Bounds(0, 10, "a finite number of at least 0 and at most 10"),
    "control_guidance_start": _SHARE,
    "control_guidance_end": _SHARE,
    "frames": at_least(1, 1000),
    "fps": Bounds(1, 120, "at least 1 and at most 120"),
    "seed": Bounds(0, MAX_SEED, f"between 0 and {MAX_SEED}", whole=True),
}


def _asked(default: Any = None, call: str = "", each: bool = False, several: bool = False) -> Any:
    """A field of `Options`.

    Args:
        default: its value where nothing is asked for.
        call: the argument of a pipeline's call that takes it as it is.
        each: whether a line of a prompts file may have its own.
        several: whether it may be a tuple with one for each ControlNet.
    """
    return field(default=default, metadata={"call": call, "each": each, "several": several})


@dataclass(frozen=True, kw_only=True)
class Options:
    """How anything is drawn, apart from the prompt and the seed: what requests and the command line have in common.

    A field with `call` reaches the pipeline and the metadata of the image by itself. None: the pipeline's own default.

    Attributes:
        negative_prompt: what the image should not show.
        prompt_weights: words of the prompts have weights in compel's syntax, and prompts any length.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance, 0 to 1000; 1 switches it off.
        width, height: pixels, multiples of 8.
        frames: of a video, 1 to 1000.
        fps: frames a second in the file of a video, 1 to 120.
        count: images.
        image: file, or an image that is open, that the images start from; the pipeline must be an image-to-image or
            inpainting one.
        mask_image: file or image that is white where `image` is replaced.
        strength: how much of `image` is replaced, above 0 to 1.
        ip_adapter_image: file or image that the pipeline's IP-Adapter is shown beside the prompt.
        control_image: file or image for a ControlNet; for several a tuple with one for each, in their order.
        controlnet_conditioning_scale: how much what the ControlNet gives counts, 0 to 10; of several one for all, or a
            tuple with one for each.
        control_guidance_start, control_guidance_end: from which share of the steps to which it counts, 0 to 1; of
            several likewise.
    """

    negative_prompt: str | None = _asked(call="negative_prompt", each=True)
    prompt_weights: bool = False
    steps: int | None = _asked(call="num_inference_steps", each=True)
    guidance_scale: float | None = _asked(call="guidance_scale", each=True)
    width: int | None = _asked(call="width", each=True)
    height: int | None = _asked(call="height", each=True)
    frames: int | None = _asked(call="num_frames", each=True)
    fps: float | None = _asked(each=True)
    count: int = _asked(1, each=True)
    image: str | Path | Image.Image | None = None
    mask_image: str | Path | Image.Image | None = None
    strength: float | None = _asked(call="strength")
    ip_adapter_image: str | Path | Image.Image | None = None
    control_image: str | Path | Image.Image | Sequence[str | Path | Image.Image] | None = field(
        default=None, metadata={"several": True}
    )
    controlnet_conditioning_scale: float | Sequence[float] | None = _asked(
        call="controlnet_conditioning_scale", several=True
    )
    control_guidance_start: float | Sequence[float] | None = _asked(call="control_guidance_start", several=True)
    control_guidance_end: float | Sequence[float] | None = _asked(call="control_guidance_end", several=True)


#: the options that a pipeline's call takes as they are -> the call's own name
CALLED = {f.name: call for f in fields(Options) if (call := f.metadata.get("call"))}
#: the options that each prompt of a file may have
EACH = tuple(f.name for f in fields(Options) if f.metadata.get("each"))
#: the options that are files, or images that are open
IMAGES = ("image", "mask_image", "ip_adapter_image", "control_image")
#: settings of an image that name a file or a folder
FILES = (*IMAGES, "controlnet", "ip_adapter", "recipe")
#: the options that may have one for each ControlNet
SEVERAL = tuple(f.name for f in fields(Options) if f.metadata.get("several"))


@by_name
@dataclass(frozen=True, kw_only=True)
class Request(Options):
    """One prompt, and how it is drawn. None: the pipeline's own default.

    Attributes:
        prompt: what is drawn; for a model of classes, a class by name or number.
        seed: image k is drawn from seed + k; by default a random one.
        others: see `Options`.

    Raises:
        ConfigurationError: for what no pipeline can draw.
    """

    prompt: str
    seed: int = field(default_factory=lambda: secrets.randbelow(2**32))

    def __post_init__(self) -> None:
        for name in ("seed", "count"):
            if getattr(self, name) is None:
                raise ConfigurationError(f"{name} must be {LIMITS[name].words}, got None")
        for name in SEVERAL:
            value = one_or_several(getattr(self, name), name)
            each = tuple(map(_as_float, value)) if isinstance(value, tuple) else _as_float(value)
            object.__setattr__(self, name, each)
        for name in IMAGES:
            for one in listed(getattr(self, name)) if name in SEVERAL else [getattr(self, name)]:
                if not isinstance(one, str | Path | Image.Image | None):
                    raise ConfigurationError(f"{name} must be the path of a file or an image, got {shown(one)}")
        check_counts(vars(self))
        check_numbers({key: getattr(self, key) for key in LIMITS})
        if self.seed > MAX_SEED - self.count + 1:
            raise ConfigurationError(f"seed {self.seed} with count {self.count} goes beyond {MAX_SEED}")
        check_text(self.prompt, "prompt")
        if self.prompt is None:
            raise ConfigurationError("the prompt must be a text, got None")
        check_text(self.negative_prompt, "negative prompt")
        self.check_strength()

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return [self.seed + k for k in range(self.count)]

    def check_strength(self, steps: int | None = None, strength: float | None = None) -> None:
        """Refuse a strength at which no step is left to run.

        Args:
            steps, strength: what the pipeline takes where the request says nothing; None: that is not known.
        """
        steps, strength = self.steps or steps, strength if self.strength is None else self.strength
        if strength is not None and steps is not None and int(steps * strength) < 1:
            raise ConfigurationError(
                f"strength {strength:g} of {steps} steps leaves no step to run; use strength "
                f"{math.ceil(1000 / steps) / 1000:g} or more, or steps {math.ceil(1 / strength)} or more"
            )


def listed(value: Any) -> tuple[Any, ...]:
    """The values of an option that may have several: of one that is not given none."""
    return value if isinstance(value, tuple) else () if value is None else (value,)


def one_or_several(value: Any, what: str) -> Any:
    """A list of one as that one, of several as a tuple, anything else as it is. An empty one is refused."""
    if not isinstance(value, (list, tuple)):
        return value
    if not value or None in value:
        raise ConfigurationError(f"{what} must be one, or one for each ControlNet, got {shown(value)}")
    return value[0] if len(value) == 1 else tuple(value)


def _as_float(value: Any) -> Any:
    """A whole number as the float that pipelines with a ControlNet ask for; anything else as it is."""
    return float(value) if type(value) is int and value.bit_length() < 1000 else value


def check_counts(values: Mapping[str, Any], before: str = "", dash: str = "_") -> None:
    """Raise `ConfigurationError` for numbers that are neither one for all ControlNets nor one for each.

    Args:
        values: of `SEVERAL`, by name; there is a `control_image` for each ControlNet.
        before, dash: see `check_numbers`.
    """
    count = len(listed(values["control_image"]))
    for name in SEVERAL:
        if len(listed(values[name])) not in (0, 1, count):
            raise ConfigurationError(
                f"{before}{name.replace('_', dash)} has {len(listed(values[name]))} values, and there "
                f"{'is 1 ControlNet' if count == 1 else f'are {count} ControlNets'}; give one for all, or one for each"
            )


def check_numbers(values: Mapping[str, Any], before: str = "", dash: str = "_") -> None:
    """Raise `ConfigurationError` for a number outside of its `LIMITS`.

    Args:
        values: by name; other names than those in `LIMITS` are left alone.
        before: what stands before a name in an error, such as a file and a line.
        dash: what stands in names in place of an underscore.
    """
    for key, bounds in LIMITS.items():
        for value in listed(values.get(key)) if key in SEVERAL else [values.get(key)]:
            if value is not None:
                bounds.check(value, before + key.replace("_", dash))
    starts, ends = (listed(values.get(f"control_guidance_{one}")) for one in ("start", "end"))
    starts, ends = starts or (0,), ends or (1,)
    count = max(len(starts), len(ends))
    for first, last in zip(*(each * count if len(each) == 1 else each for each in (starts, ends)), strict=False):
        if first >= last:
            one, other = (f"control_guidance_{one}".replace("_", dash) for one in ("start", "end"))
            other = f"--{other}" if before == "--" else other
            raise ConfigurationError(f"{before}{one} must be below {other}, got {first:g} and {last:g}")


def check_text(text: str | None, what: str) -> None:
    """Raise `ConfigurationError` for a prompt that is no Unicode text, or longer than any model reads."""
    if text is None:
        return
    if not isinstance(text, str):
        raise ConfigurationError(f"the {what} must be a text, got {shown(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"the {what} {shown(text)} is not valid UTF-8 at character {error.start + 1}; check the encoding of the "
            "terminal or file it comes from"
        ) from error
    if len(text) > MAX_TEXT:
        raise ConfigurationError(f"the {what} has {len(text)} characters; at most {MAX_TEXT} are allowed")
