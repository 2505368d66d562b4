"""What the classes of a pipeline's components expect of their weights, compared before the weights are read.

transformers fills in what is missing with random numbers, and diffusers leaves it out or at the values of a fresh
model; so a damaged folder would draw, only not what its model draws.
"""

from __future__ import annotations

import inspect
import logging
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ConfigMixin, ModelMixin
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from diffusion_accel import schedulers
from diffusion_accel.diffusers_compat import expendable_names, with_present_names
from diffusion_accel.errors import AccelerationError, ModelLoadError
from diffusion_accel.io import printable, read_json
from diffusion_accel.model_files.folders import CONFIGS, LIBRARY, MULTI, TABLES, controlnets_in, is_pair
from diffusion_accel.model_files.headers import PICKLE_SUFFIXES, safetensors_header
from diffusion_accel.model_files.index_notes import INDEX

logger = logging.getLogger(__name__)

BUFFERS_LIMIT = 4 * 2**30  # bytes that a model may compute for itself when it is built
_DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32},
    **{"I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


def check_components(
    folder: Path, variant: str | None = None, given: Collection[str] = (), allow_pickle: bool = False
) -> None:
    """Compare the weights of a checked pipeline folder with what its components' classes expect.

    Args:
        folder: the pipeline folder.
        variant: of the weights, such as "fp16".
        given: components that are not loaded from the folder.
        allow_pickle: weights may be pickles.

    Raises:
        ModelLoadError: a tensor is missing or has another shape or kind of number, or a configuration describes a
            model far larger than its weights; with the component and the name of the tensor.
    """
    for name, value in read_json(folder / INDEX, error=ModelLoadError, nonfinite=True).items():
        if name in given or not is_pair(value) or value[0] is None or not name.isidentifier() or len(name) > 100:
            continue
        if not (folder / name).is_dir():
            # a folder of one model may have its files at the root
            if not any((folder / file).is_file() for file in (*TABLES, "tokenizer.json")):
                raise ModelLoadError(f"{folder} has no folder {name}, which its {INDEX} names")
            continue
        several = name == "controlnet" and str(value[1]).startswith(MULTI)
        cls = _class_of(value[0], str(value[1]).removeprefix(MULTI) if several else value[1])
        for part in controlnets_in(folder) if several else [name]:
            if isinstance(cls, type) and issubclass(cls, ConfigMixin):
                _check_types(cls, folder / part)
            if _is_plain_model(cls):
                check_keys(folder / part, cls, variant, allow_pickle)


def check_keys(
    folder: Path, cls: type[ModelMixin | PreTrainedModel], variant: str | None = None, allow_pickle: bool = False
) -> None:
    """Compare the weights in one component's folder with what `cls`, a model of diffusers or transformers, expects.

    Only names and shapes are read, and the model is built without memory for its weights. A model that cannot be built
    so, or is stored in a way of its own (quantized, for example), is left to its own loader. Tensors that the class
    does not use are worth a warning: the configuration may be that of a smaller model.

    Raises:
        ModelLoadError: see `check_components`.
    """
    files = _weight_files(folder, cls, variant, allow_pickle)
    if not files or not (folder / "config.json").is_file():
        return
    if read_json(folder / "config.json", error=ModelLoadError, nonfinite=True).get("quantization_config"):
        return
    tensors: dict[str, torch.Tensor] = {}
    compare = _compare_diffusers if issubclass(cls, ModelMixin) else _compare_transformers
    where = f"{folder} does not fit its class {cls.__name__}"
    try:
        for file in files:
            tensors |= _shapes(file)
        with bounded(len(tensors), str(folder)), _quiet():
            missing, unused, other = compare(folder, cls, tensors, len(files) > 1)
    except (KeyboardInterrupt, AccelerationError):
        raise
    except Exception as error:
        if "overflow" in str(error):
            raise ModelLoadError(f"{folder}: its config.json describes a model far larger than its weights") from error
        # built in a way that needs more than shapes: its own loader says what is wrong, if anything is
        return
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelLoadError(f"{where}: its weights have no {printable(sorted(missing)[0])}{more}; get a fresh copy")
    if other:
        key, found, wanted = sorted(other)[0]
        raise ModelLoadError(f"{where}: {printable(key)} is {found} instead of {wanted}")
    if unused:
        logger.warning(
            "%s has %d tensors that %s does not use, %s for example; its config.json may be that of another model",
            folder,
            len(unused),
            cls.__name__,
            printable(sorted(unused)[0]),
        )


def _shapes(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, without their values."""
    if file.suffix in PICKLE_SUFFIXES:
        found = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
    return {
        key: torch.empty(entry["shape"], dtype=_DTYPES.get(entry["dtype"], torch.uint8), device="meta")
        for key, entry in safetensors_header(file).items()
        if key != "__metadata__"
    }


def _class_of(library: str, name: str) -> Any:
    """The class of a component; None if the two libraries have none of this name."""
    place: Any = {"diffusers": diffusers, "transformers": transformers, LIBRARY: schedulers}.get(library)
    if place is None:
        place = getattr(diffusers.pipelines, library, None)
    return getattr(place, name, None)


def _is_plain_model(cls: type[ModelMixin | PreTrainedModel]) -> bool:
    """Whether a class is a model that is loaded in the way of its library."""
    if not isinstance(cls, type) or not issubclass(cls, (ModelMixin, PreTrainedModel)):
        return False
    own, *loaders = (getattr(c, "from_pretrained").__func__ for c in (cls, ModelMixin, PreTrainedModel))  # noqa: B009, for mypy
    return own in loaders


def _check_types(cls: type[ModelMixin | PreTrainedModel], folder: Path) -> None:
    """Refuse texts and tables where a class of diffusers takes numbers, and the other way round."""
    file = next((folder / name for name in CONFIGS if (folder / name).is_file()), None)
    values = {} if file is None else read_json(file, error=ModelLoadError, nonfinite=True)
    for key, parameter in inspect.signature(cls.__init__).parameters.items():
        hint, value = str(parameter.annotation).removeprefix("<class '").removesuffix("'>"), values.get(key)
        wrong = {"int": (str, dict), "float": (str, dict, list), "bool": (str, dict, list), "str": (int, float, dict)}
        if isinstance(value, wrong.get(hint, ())):
            words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
            raise ModelLoadError(f"{file}: {key} must be {words[hint]}, got {printable(value)[:60]}")


def _weight_files(folder: Path, cls: type, variant: str | None, allow_pickle: bool) -> list[Path]:
    """The files that the class's loader will read; empty where that is not plain."""
    ours = issubclass(cls, ModelMixin)
    stem = "diffusion_pytorch_model" if ours else "model"
    kinds = [(stem, "safetensors"), (stem if ours else "pytorch_model", "bin")]
    for name, kind in kinds if allow_pickle else kinds[:1]:
        for mark in (f".{variant}", "") if variant else ("",):
            single, index = folder / f"{name}{mark}.{kind}", folder / f"{name}.{kind}.index{mark}.json"
            if single.is_file() and not (ours and index.is_file()):
                return [single]
            if index.is_file():
                shards = read_json(index, error=ModelLoadError, nonfinite=True)["weight_map"]
                files = [folder / str(shard) for shard in sorted(set(shards.values()))]
                return files if all(file.is_file() for file in files) else []
    return []


def _compare_diffusers(
    folder: Path, cls: type[ModelMixin | PreTrainedModel], tensors: dict[str, torch.Tensor], sharded: bool
) -> tuple[set[str], set[str], list[tuple[str, str, str]]]:
    with torch.device("meta"):
        model = cls.from_config(cls.load_config(str(folder), local_files_only=True))
    if not sharded:
        with_present_names(model, tensors)
    expected = model.state_dict()
    ignored = expendable_names(cls)
    unused = {key for key in tensors.keys() - expected.keys() if not any(re.search(p, key) for p in ignored)}
    return set(expected) - set(tensors), unused, _others(expected, tensors)


def _compare_transformers(
    folder: Path, cls: type[ModelMixin | PreTrainedModel], tensors: dict[str, torch.Tensor], _sharded: bool
) -> tuple[set[str], set[str], list[tuple[str, str, str]]]:
    config = cls.config_class.from_pretrained(str(folder), local_files_only=True)
    model, info = cls.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        device_map={"": "meta"},
        local_files_only=True,
    )
    other = [(key, str(list(found)), str(list(wanted))) for key, found, wanted in info["mismatched_keys"]]
    return set(info["missing_keys"]), set(info["unexpected_keys"]), other or _others(model.state_dict(), tensors)


def _others(expected: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> list[tuple[str, str, str]]:
    """Tensors of another shape or kind of number: name, what was found, what was expected."""
    found = []
    for key in expected.keys() & tensors.keys():
        want, have = expected[key], tensors[key]
        if want.shape != have.shape:
            found.append((key, str(list(have.shape)), str(list(want.shape))))
        elif want.is_floating_point() and not have.is_floating_point():
            found.append((key, str(have.dtype), str(want.dtype)))
    return found


@contextmanager
def bounded(tensors: int, where: str) -> Iterator[None]:
    """While a model is built: refuse one that has far more layers, or larger tables, than its weights have tensors.

    Raises:
        ModelLoadError: in the middle of building.
    """
    most, here = 10 * tensors + 5000, threading.get_ident()
    made = size = 0

    def part(_module: torch.nn.Module, _name: str, _value: object) -> None:
        nonlocal made
        if threading.get_ident() == here:
            made += 1
            if made > most:
                raise ModelLoadError(
                    f"{where}: its config.json describes a model far larger than its {tensors} weights"
                )

    def buffer(_module: torch.nn.Module, _name: str, value: object) -> None:
        nonlocal size
        if threading.get_ident() == here and isinstance(value, torch.Tensor):
            size += value.nbytes
            if size > BUFFERS_LIMIT:
                raise ModelLoadError(f"{where}: its config.json asks for tables of more than {BUFFERS_LIMIT} bytes")

    handles = [
        torch_module.register_module_module_registration_hook(part),
        torch_module.register_module_parameter_registration_hook(part),
        torch_module.register_module_buffer_registration_hook(buffer),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries say what they have to say when they load for real."""
    logs = (diffusers.utils.logging, transformers.utils.logging)
    before = [(log, log.get_verbosity()) for log in logs]
    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        for log in logs:
            log.set_verbosity(log.CRITICAL)
        yield
    finally:
        for log, level in before:
            log.set_verbosity(level)
        if bar:
            transformers.utils.logging.enable_progress_bar()
