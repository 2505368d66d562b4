"""What a pipeline is asked to draw: a prompt, a class, or nothing at all."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from . import denoisers, sizes  # names of denoisers are loaded when they are used: this module needs no torch
from .errors import ConfigurationError, UnsupportedPipelineError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PROMPT, CLASS, NOTHING = "prompt", "class", "nothing"
_BESIDE = {"controlnet", "adapter"}  # components that read an image of their own
_CONTROLS = ("control_image", "conditioning_frames", "image")  # what a call names it
_ALWAYS = ("self", "prompt", "class_labels")  # parameters of a call that it is given in any case


def condition_of(pipeline: DiffusionPipeline) -> str:
    """What the pipeline is called with: `PROMPT`, `CLASS` (diffusers' `class_labels`) or `NOTHING`.

    A pipeline may take class labels and have a model without classes (diffusers' ConsistencyModelPipeline): `NOTHING`.
    """
    parameters = call_parameters(pipeline)
    if "prompt" in parameters:
        return PROMPT
    return CLASS if "class_labels" in parameters and class_count(pipeline) else NOTHING


def takes_prompt(pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> bool:
    """Whether a pipeline, or any of its class, is called with a prompt."""
    return "prompt" in call_parameters(pipeline)


def call_parameters(pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> tuple[str, ...]:
    """The parameter names of the call of a pipeline, or of its class."""
    return tuple(inspect.signature(_class(pipeline).__call__).parameters)


def _class(pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    return pipeline if isinstance(pipeline, type) else type(pipeline)


def missing_arguments(pipeline: DiffusionPipeline | type[DiffusionPipeline], given: Collection[str]) -> list[str]:
    """What the call of a pipeline, or of its class, cannot do without, beside the prompt or class, and is not among the
    names that are given: arguments without a default, the images of inpainting, and what a ControlNet or T2I-Adapter
    is given, whose defaults are None in most classes."""
    parameters = inspect.signature(_class(pipeline).__call__).parameters
    needed = {"image", "mask_image"} if "mask_image" in parameters else set()
    if _BESIDE & inspect.signature(_class(pipeline).__init__).parameters.keys():
        needed |= {next((name for name in _CONTROLS if name in parameters), "")}
    for name, one in parameters.items():
        if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD and name not in _ALWAYS:
            needed.add(name)
    return [name for name in parameters if name in needed and name not in given]


def check_prompts_do(pipeline: DiffusionPipeline | type[DiffusionPipeline], options: Collection[str] = ()) -> None:
    """Raise `UnsupportedPipelineError` for a pipeline, or a class of them, that needs more than prompts and these
    arguments to be called."""
    if missing := missing_arguments(pipeline, options):
        raise UnsupportedPipelineError(
            f"{_class(pipeline).__name__} needs {' and '.join(missing)}, and here it is called with prompts or classes "
            "alone"
        )


def class_count(pipeline: DiffusionPipeline) -> int:
    """How many classes the denoiser knows; 0 if none."""
    config = getattr(denoisers.find_denoiser(pipeline), "config", {})
    return int(config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 0)


def class_names(pipeline: DiffusionPipeline) -> dict[str, int]:
    """The names of the classes with their ids, as the pipeline knows them (`labels` of diffusers' DiTPipeline);
    empty where a model has numbers only."""
    return dict(getattr(pipeline, "labels", None) or {})


def keep_class_names(pipeline: DiffusionPipeline) -> None:
    """Let `save_pretrained` write the names of the classes again: diffusers reads them and forgets where they were."""
    names = class_names(pipeline)
    if names and not pipeline.config.get("id2label"):
        found: dict[int, list[str]] = {}
        for name, number in names.items():
            found.setdefault(number, []).append(name)
        pipeline.register_to_config(id2label={str(number): ", ".join(found[number]) for number in sorted(found)})


def class_ids(pipeline: DiffusionPipeline, texts: list[str]) -> list[int]:
    """The class that each text names: by its name, whatever its case, or by its number.

    Raises:
        ConfigurationError: the model has no such class; with the nearest names.
    """
    names = class_names(pipeline)
    folded = {name.casefold(): number for name, number in names.items()}
    count = class_count(pipeline)
    known = set(names.values()) or range(count)
    found = []
    for text in texts:
        word = text.strip()
        number = names.get(word, folded.get(word.casefold()))
        if number is None and word.isascii() and word.isdigit() and len(word) < 10 and int(word) in known:
            number = int(word)
        if number is None:
            raise ConfigurationError(f"the model has no class {word[:80]!r}; {_classes(names, count, word)}")
        found.append(number)
    return found


def _classes(names: dict[str, int], count: int, word: str) -> str:
    if not names:
        return f"its classes have numbers only, 0 to {count - 1}"
    by_case = {name.casefold(): name for name in names}
    folded = word.casefold()
    near = [by_case[name] for name in difflib.get_close_matches(folded, by_case, n=3)]
    near = near or [by_case[name] for name in by_case if folded and folded in name][:3]
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    some = sorted(names)[:8]
    more = f", … ({len(set(names.values()))} in all)" if len(names) > len(some) else ""
    return f"the classes are: {', '.join(some)}{more}"


def usual_texts(pipeline: DiffusionPipeline, count: int) -> list[str]:
    """What to draw where nobody says: classes evenly over all there are, or empty texts where nothing is asked.

    Raises:
        ConfigurationError: the pipeline takes a prompt, which nobody can guess.
    """
    condition = condition_of(pipeline)
    if condition == PROMPT:
        raise ConfigurationError(f"{type(pipeline).__name__} takes prompts: give some")
    if condition == NOTHING:
        return [""] * count
    ids = sorted(set(class_names(pipeline).values())) or list(range(class_count(pipeline)))
    by_id = {number: name for name, number in reversed(class_names(pipeline).items())}
    chosen = [ids[(2 * i + 1) * len(ids) // (2 * count) % len(ids)] for i in range(count)]
    return [by_id.get(number, str(number)) for number in chosen]


def call_arguments(pipeline: DiffusionPipeline, texts: list[str]) -> dict[str, Any]:
    """The arguments that make the pipeline draw one image for each text, by name.

    Raises:
        ConfigurationError: the model has no such class.
    """
    condition = condition_of(pipeline)
    if condition == PROMPT:
        return {"prompt": list(texts)}
    given: dict[str, Any] = {}
    parameters = call_parameters(pipeline)
    if condition == CLASS:
        given["class_labels"] = class_ids(pipeline, texts)
    if "batch_size" in parameters:
        given["batch_size"] = len(texts)
    return given


def own_arguments(pipeline: DiffusionPipeline, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call in the pipeline's own terms: what it is told beside the prompt, `given` by name.

    - A pipeline whose `guidance_scale` is an input of guidance-distilled models takes it as `true_cfg_scale` for a
      model that is none (Flux schnell, Qwen-Image), with an empty negative prompt if nobody gives one: without one it
      would draw without guidance.
    - The size of an image that starts from nothing is the one that the model was trained for, also where the pipeline's
      own is a constant of its class.
    - `max_sequence_length` is no longer than what the tokenizers read: Flux would pad the texts of any model to 512.
    """
    parameters, given = inspect.signature(type(pipeline).__call__).parameters, dict(given)
    if "guidance_scale" in given and takes_true_guidance(pipeline):
        given.setdefault("true_cfg_scale", given.pop("guidance_scale"))
    negative = [given.get(name) for name in ("negative_prompt", "negative_prompt_embeds")]
    if (given.get("true_cfg_scale") or 1) > 1 and negative == [None, None]:
        given["negative_prompt"] = ""
    starts = [name for name in ("image", "control_image", "latents") if given.get(name) is not None]
    if {"width", "height"} <= parameters.keys() and not starts and (side := sizes.side_to_ask_for(pipeline)):
        given |= {name: side for name in ("width", "height") if given.get(name) is None}
    if "max_sequence_length" in parameters and "max_sequence_length" not in given:
        longest = [getattr(part, "model_max_length", 0) for part in getattr(pipeline, "components", {}).values()]
        usual = parameters["max_sequence_length"].default
        if isinstance(usual, int) and 0 < max(longest, default=0) < usual:
            given["max_sequence_length"] = max(longest)
    return given


def takes_true_guidance(pipeline: DiffusionPipeline) -> bool:
    """Whether classifier-free guidance is the pipeline's `true_cfg_scale`: its model is not guidance-distilled."""
    known = call_parameters(pipeline)
    return "true_cfg_scale" in known and denoisers.scale_argument(pipeline, known) == "true_cfg_scale"
