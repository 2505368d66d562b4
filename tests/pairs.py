"""What can be switched on for a pipeline, alone and together with something else, on one pipeline of each shape.

Beside the features these are a quantized denoiser, a learned solver and a LoRA, which are no features. A `Case` is a
pipeline on which they are switched on and off; `refused` says what does not go together. `docs/combinations.md` is made
of this, and tests/core/test_pairs.py draws every pair.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import zoo
from peft import LoraConfig, get_peft_model_state_dict
from solvers import odd
from transparency_weights import write_weights

from diffusion_accel import (
    Compiled,
    ControlNetParallel,
    EncoderReuse,
    LatentTransparency,
    LearnedMultistepScheduler,
    PatchParallel,
    Reuse,
    TaskRouting,
    accelerate,
    load_pipeline,
    quantize_files,
)
from diffusion_accel.conditioning import own_arguments
from diffusion_accel.denoisers import denoiser_names
from diffusion_accel.errors import AccelerationError
from diffusion_accel.feature import Feature
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.quant.model import set_runtime

STEPS = 3


# ---------------------------------------------------------------------- pipelines
def _embedded(name: str) -> zoo.Built:
    pipe = load_pipeline(name)
    call = {"prompt": EMBEDDED[name].example, "guidance_scale": 3.0, "height": 32, "width": 32, "output_type": "pt"}
    return pipe, own_arguments(pipe, call)


def _decoded(build: Callable[[], zoo.Built]) -> zoo.Built:
    """The same with an image in the place of latents."""
    pipe, call = build()
    if getattr(pipe.vae.config, "shift_factor", 0) is None:
        pipe.vae.register_to_config(shift_factor=0.0)
    return pipe, {**call, "output_type": "pt"}


KINDS: dict[str, Callable[[], zoo.Built]] = {
    "sticker": functools.partial(_embedded, "sticker"),
    "sticker-dit": functools.partial(_embedded, "sticker-dit"),
    "sdxl": functools.partial(_decoded, zoo.sdxl),
    "controlnet": functools.partial(_decoded, zoo.controlnet),
    "animatediff": zoo.animatediff,
    "wan": functools.partial(zoo.wan, two=False),
    "flux": functools.partial(_decoded, zoo.flux_guided),
}


# ---------------------------------------------------------------------- what is switched on
@dataclass(frozen=True)
class Part:
    """Something that can be switched on for a pipeline.

    Attributes:
        about: what it is, for the page.
        setting: the feature for a kind of pipeline; None: it is no feature.
        exact: with it the images are those without, bit for bit (compiled: but for the rounding of its engine).
    """

    about: str
    setting: Callable[[str], Feature] | None = None
    exact: bool = False


FILES: Path | None = None  # a folder for what parts are loaded from, of processes that share it


@functools.cache
def _own_files() -> Path:
    made = Path(tempfile.mkdtemp(prefix="pairs-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _made(name: str, make: Callable[[Path], object]) -> Path:
    """A folder with files that are made once."""
    folder = (FILES or _own_files()) / name
    if not folder.exists():
        make(folder)
    return folder


def transparency(kind: str) -> str:
    """The weights for a kind of pipeline: those that ship, or random ones, with an adapter where the denoiser is a
    U-Net."""

    def make(folder: Path) -> None:
        pipe = KINDS[kind]()[0]
        write_weights(folder, getattr(pipe, "unet", None) or zoo.unet())
        if not hasattr(pipe, "unet"):
            (folder / "adapter.safetensors").unlink()

    return "" if kind in EMBEDDED else str(_made(f"transparency-{kind}", make))


def quantized(kind: str, inputs: bool = False) -> Path:
    """The pipeline as a folder with 8-bit weights, and inputs."""

    def make(folder: Path) -> None:
        source = EMBEDDED[kind].path if kind in EMBEDDED else folder.with_name(f"plain-{kind}")
        if kind not in EMBEDDED:
            KINDS[kind]()[0].save_pretrained(source)
        quantize_files(source, folder, weight_bits=8, activation_bits=8 if inputs else None, group=0)

    return _made(f"quantized{'-inputs' * inputs}-{kind}", make)


def _shallow(kind: str) -> Feature:
    return Reuse(plan="shallow:2,1" if kind in ("sticker-dit", "wan", "flux") else "deepcache:2")


PARTS: dict[str, Part] = {
    "compiled": Part("graphs of the denoiser and the VAE: `Compiled()`", lambda _: Compiled(cache=False), exact=True),
    "patch_parallel": Part("one image on several processes: `PatchParallel()`", lambda _: PatchParallel(), exact=True),
    "controlnet_parallel": Part(
        "the ControlNet beside the U-Net: `ControlNetParallel()`", lambda _: ControlNetParallel(), exact=True
    ),
    "task_routing": Part("task-routed channels: `TaskRouting(untrained=True)`", lambda _: TaskRouting(untrained=True)),
    "encoder_reuse": Part("`EncoderReuse()`", lambda _: EncoderReuse(schedule="uniform:2")),
    "hold": Part('plans that hold whole steps: `Reuse(plan="hold:2")`', lambda _: Reuse(plan="hold:2")),
    "shallow": Part('plans with shallow steps: `Reuse(plan="deepcache:2")`, of transformers `shallow:2,1`', _shallow),
    "transparent": Part(
        "images with alpha: `LatentTransparency()`",
        lambda kind: LatentTransparency(weights=transparency(kind), views=1),
    ),
    "quantized": Part("8-bit weights: `quantize_files`"),
    "inputs": Part("8-bit weights, and inputs with grids that are found at every call"),
    "learned": Part("a learned solver: `LearnedMultistepScheduler`"),
    "lora": Part("a LoRA: `load_lora_weights`"),
}  # patch_parallel is here on one process; tests/parallel/pair_cases.py has two
#: everything at once; patch_parallel goes with it on several processes
STACK = ("quantized", "learned", "task_routing", "shallow", "transparent")
SAME = ({"hold", "shallow"}, {"quantized", "inputs"})  # two settings of one thing
PAIRS = [(a, b) for a, b in itertools.combinations(PARTS, 2) if {a, b} not in SAME]


class Case:
    """A pipeline on which parts are switched on and off."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.pipe, self.call = KINDS[kind]()
        self.steps = 5 if kind in EMBEDDED else STEPS  # the solvers that ship are learnt for 5 and more
        self._own: dict[str, Any] = {}  # components that something stands in the place of
        self._made: dict[tuple[str, str], Any] = {}  # quantized denoisers
        self.others: list[str] = []  # what is on and no feature

    def on(self, *names: str) -> None:
        """Switch parts on, one after the other.

        Raises:
            AccelerationError: one of them is refused.
        """
        for name in names:
            setting = PARTS[name].setting
            if setting is not None:
                accelerate(self.pipe, setting(self.kind))
            else:
                {"learned": self._learned, "lora": self._lora}.get(name, partial(self._quantize, name))()
                self.others.append(name)

    def idle(self, name: str) -> bool:
        """Switch a part on in the setting that changes nothing; False if it has none."""
        setting = PARTS[name].setting
        if setting is not None:
            accelerate(self.pipe, type(setting(self.kind)).neutral())
        elif name == "lora":
            self.on("lora")
            self.pipe.set_adapters("one", 0.0)
        else:
            return False
        return True

    def off(self, name: str, disable: bool = False) -> None:
        """Switch a part off: a feature for good, or only disabled."""
        setting = PARTS[name].setting
        if setting is not None:
            change = self.pipe.acceleration.disable if disable else self.pipe.acceleration.remove
            change(setting(self.kind).name)
            return
        self.others.remove(name)
        if name == "lora":
            self.pipe.unload_lora_weights()
        else:
            for component in ["scheduler"] if name == "learned" else denoiser_names(self.pipe):
                setattr(self.pipe, component, self._own.pop(component))

    def draw(self, **changes: Any) -> torch.Tensor:
        """The image or the latents of the call."""
        return zoo.run(self.pipe, self.call, **{"steps": self.steps, **changes})

    def _put(self, name: str, component: Any) -> None:
        self._own[name] = getattr(self.pipe, name)
        setattr(self.pipe, name, component)

    def _quantize(self, what: str) -> None:
        for name in denoiser_names(self.pipe):
            if (what, name) not in self._made:
                folder = quantized(self.kind, inputs=what == "inputs") / name
                self._made[what, name] = type(getattr(self.pipe, name)).from_pretrained(folder)
                set_runtime(self._made[what, name], "simulated")
            self._put(name, self._made[what, name])

    def _learned(self) -> None:
        embedded = self.kind in EMBEDDED
        made = LearnedMultistepScheduler.for_model(self.kind) if embedded else odd(self.pipe.scheduler, self.steps)
        self._put("scheduler", made)

    def _lora(self) -> None:
        self.pipe.load_lora_weights({k: v.clone() for k, v in _lora(self.kind).items()}, adapter_name="one")


@functools.cache
def _lora(kind: str) -> dict[str, torch.Tensor]:
    """A LoRA with random weights, as its file names them."""
    pipe, _ = KINDS[kind]()
    (name,) = denoiser_names(pipe)
    model = getattr(pipe, name)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    return {f"{name}.{key}": value.detach().clone() for key, value in get_peft_model_state_dict(model).items()}


def refused(case: Case, *names: str) -> str:
    """Why parts cannot be switched on together, in this order; empty if they can. They are off afterwards."""
    done: list[str] = []
    try:
        for name in names:
            case.on(name)
            done.append(name)
    except AccelerationError as error:
        return str(error)
    finally:
        for name in reversed(done):
            case.off(name)
    return ""


def reasons(kind: str) -> dict[str, str]:
    """What is refused on a kind of pipeline: "a" or "a+b", as in `PARTS` and `PAIRS`, with the error."""
    case = Case(kind)
    alone = {name: refused(case, name) for name in PARTS}
    able = [name for name in PARTS if not alone[name]]
    found = {name: reason for name, reason in alone.items() if reason}
    for first in sorted(able, key=_ORDER.index):
        case.on(first)
        for second in sorted(able, key=_ORDER.index):
            pair = tuple(sorted((first, second), key=list(PARTS).index))
            if _ORDER.index(first) < _ORDER.index(second) and pair in PAIRS and (reason := refused(case, second)):
                found["+".join(pair)] = reason
        case.off(first)
    return found


#: what is no feature is switched on first: it is refused by nothing, and takes long
_ORDER = sorted(PARTS, key=["quantized", "inputs", "learned", "lora", "transparent", *PARTS].index)


# ---------------------------------------------------------------------- the page
DATA = Path(__file__).parents[1] / "docs" / "data" / "combinations.json"
PAGE = DATA.parents[1] / "combinations.md"
_HEAD = """# What goes together

What can be switched on for one pipeline, alone and two at a time, on the embedded models and on tiny pipelines of other
shapes. A cell is *yes* where the laws hold:

- off is bit-identical to never having had it, the setting that does nothing as well;
- a second call draws the first image;
- both, switched on in either order, draw the same image;
- one of them switched off leaves what the other draws alone.

Anything else is refused with its reason, before anything is changed. `tests/core/test_pairs.py` draws the cells, and
`tests/parallel/pair_cases.py` those of `patch_parallel` on two processes. `python scripts/combinations.py` writes this
page from what the toolkit answers; `accelerate()` says the same for your pipeline and your settings.
"""
_TAIL = """
## All of it

A learned solver, shallow steps, quantized weights, transparent images and task routing work together, on one process
and with `patch_parallel` on two. The [engine](engine.md) serves them as well, without `patch_parallel`.
`tests/serving/test_full_stack.py` and `tests/parallel/pair_cases.py` draw both.

- A quantized denoiser comes first, a LoRA after it: what has adapters is not quantized.
- `hold` and `shallow` are plans of one feature, `Reuse`: one replaces the other, and one plan may have both.
- Whether quantized inputs are rounded hangs on their runtime, too: `dequantize` and `bfloat16` leave them as they are.
- Whether a plan fits a learned solver's number of steps is said when the pipeline is called.
"""


def page(found: dict[str, dict[str, str]]) -> str:
    """The page of what is refused, by kind of pipeline, as `reasons` has it."""
    numbers: dict[str, int] = {}

    def mark(texts: Iterable[str]) -> str:
        marks = sorted({numbers.setdefault(text.split(": ", 1)[-1], len(numbers) + 1) for text in texts})
        return f"no ({', '.join(f'[{n}](#reasons)' for n in marks)})"

    lines = [_HEAD, "## What there is", "", "| name | what it is |", "| --- | --- |"]
    lines += [f"| {name} | {part.about} |" for name, part in PARTS.items()]
    lines += ["", "## Alone", "", f"| | {' | '.join(KINDS)} |", f"| --- |{' --- |' * len(KINDS)}"]
    for name in PARTS:
        cells = [mark([found[kind][name]]) if name in found[kind] else "yes" for kind in KINDS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    names = list(PARTS)
    lines += ["", "## Two at a time", "", "On every pipeline above that takes both.", ""]
    lines += [f"| | {' | '.join(names[:-1])} |", f"| --- |{' --- |' * (len(names) - 1)}"]
    for row, name in enumerate(names[1:], 1):
        cells = [""] * (len(names) - 1)
        for column, other in enumerate(names[:row]):
            both = [kind for kind in KINDS if not {name, other} & {*found[kind]}]
            no = [kind for kind in both if f"{other}+{name}" in found[kind]]
            of = "" if no == both else f"{', '.join(no)}: "
            cells[column] = of + mark(found[kind][f"{other}+{name}"] for kind in no) if no else "yes"
            if {name, other} in SAME:
                cells[column] = ""
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. {text[0].upper()}{text[1:]}." for text, number in numbers.items()]
    return "\n".join(lines) + "\n" + _TAIL
