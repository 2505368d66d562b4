"""A pipeline folder before anything is loaded from it: its files, names and numbers. Needs neither torch nor diffusers.

What a component's class expects of its weights is compared in `components.py`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion_accel.errors import ModelLoadError
from diffusion_accel.io import is_there, printable, read_json

from .headers import PICKLE_SUFFIXES, check_regular, check_weights
from .index_notes import INDEX, notes_in

MULTI = "Multi"  # how the class of several ControlNets begins, which lie in folders of their own
LIBRARY = "diffusion_accel.schedulers"  # of this package's own scheduler, in an index
CONFIGS = ("config.json", "scheduler_config.json")
# JSON files that are tables; the others of a folder (vocabularies) may be large and are only opened by their own reader
TABLES = (*CONFIGS, "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json")
NUMBER_LIMIT = 1 << 40  # of any whole number in a configuration
LAYERS_LIMIT = 10_000  # of anything that counts layers
TIMESTEPS_LIMIT = 100_000
FACTOR_LIMITS = (1e-9, 1e9)  # of what latents are multiplied with or divided by
PADDING_LIMIT = 64  # of a convolution, in pixels
SIDE_LIMIT = 1 << 16  # of a sample, in latents or pixels
CHOICES = {
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow", "flow_prediction", "original_sample", "trigflow"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
}
_UNBOUNDED = ("lambda_min_clipped",)  # -Infinity is what DPM-Solver's is by default
_LAYERS = ("layers", "blocks", "depth")
_COUNTS = (*_LAYERS, "channels", "groups", "heads", "dim")
_READ = (".json", ".safetensors", ".txt", ".model")  # kinds of files that libraries open by name
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "vocab.tsv", "tekken.json", "*.model", "*.tiktoken")


def check_folder(folder: Path, allow_pickle: bool = False, trusted: bool = False) -> None:
    """Check that `folder` is a diffusers pipeline whose files are whole.

    Args:
        folder: the folder with the model_index.json.
        allow_pickle: weights may be pickles.
        trusted: components may come from any library (`trust_remote_code`).

    Raises:
        ModelLoadError: a file is damaged, no regular file or lies outside, a component is of a library that is none of
            diffusers' own, or a number cannot be used; with the file, and what is wrong.
    """
    index = folder / INDEX
    if not index.exists() and not index.is_symlink():
        raise ModelLoadError(f"{folder} is not a diffusers pipeline folder: it has no {INDEX}")
    check_regular(index)
    _check_link(index, folder.resolve())
    values = read_json(index, error=ModelLoadError, nonfinite=True)
    kind = values.get("_class_name") if isinstance(values, dict) else None
    if not isinstance(kind, str) and not is_pair(kind):
        raise ModelLoadError(f"{index} names no pipeline class (_class_name)")
    notes_in(values, index)
    for name, value in values.items():
        if not name.isidentifier() or len(name) > 100:
            continue  # no component can be called that, so diffusers leaves it out
        part = folder / name
        if is_pair(value) and not name.startswith("_") and value[0] is not None and not trusted:
            _check_library(index, name, value[0], part)
        if not part.is_dir():
            continue
        if not is_pair(value):
            raise ModelLoadError(f"{index}: {name} must name a library and a class, got {printable(value)[:60]}")
        check_component(part, allow_pickle, folder)
        for other in controlnets_in(folder, values)[1:] if name == "controlnet" else ():
            check_component(folder / other, allow_pickle, folder)
        if value[1] and "Tokenizer" in value[1] and "ByT5" not in value[1]:
            _check_tokenizer(part, folder / name.replace("tokenizer", "text_encoder"), value[1].startswith("CLIP"))


def check_component(folder: Path, allow_pickle: bool = False, root: Path | None = None) -> None:
    """Check the files of one component: regular ones that lie in the folder, whole weights, usable numbers.

    Args:
        folder: of the component.
        allow_pickle: weights may be pickles.
        root: the folder of the pipeline, in which links may lead elsewhere; None: `folder` itself.

    Raises:
        ModelLoadError: see `check_folder`.
    """
    inside = (root or folder).resolve()
    try:
        files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise ModelLoadError(f"{folder} cannot be read: {error.strerror}") from error
    for file in files:
        if not file.is_dir() or file.suffix in _READ:
            check_regular(file)
            _check_link(file, inside)
    for name in TABLES:
        if (folder / name).is_file():
            values = _table(folder / name)
            if name in CONFIGS:
                check_config(values, folder / name)
    for file in folder.glob("*.index*.json"):
        shards = _table(file).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelLoadError(f"{file} has no weight_map")
        for shard in set(map(str, shards.values())):
            if Path(shard).name != shard:
                raise ModelLoadError(f"{file} names {printable(shard[:80])!r}, which is no file beside it")
    weights = [file for file in files if file.suffix == ".safetensors"]
    for file in weights:
        check_weights(file)
    pickles = [file for file in files if file.suffix in PICKLE_SUFFIXES]
    if pickles and not weights and not allow_pickle:
        check_weights(pickles[0])


def _check_link(file: Path, inside: Path) -> None:
    if leaves(file, inside):
        raise ModelLoadError(f"{file} is a link that leaves the folder of the model; put a copy there instead")


def leaves(file: Path, inside: Path) -> bool:
    """Whether a file is a link that leads out of the folder `inside`; into the store of the hub's cache it may."""
    target = file.resolve()
    in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return not target.is_relative_to(inside) and not in_cache


def _table(file: Path) -> dict[str, Any]:
    values = read_json(file, error=ModelLoadError, nonfinite=True)
    if not isinstance(values, dict):
        raise ModelLoadError(f"{file} is not a table of settings")
    return values


def is_pair(value: object) -> bool:
    """Whether a value of a model_index.json names a library and a class (or neither)."""
    return isinstance(value, list) and len(value) == 2 and all(v is None or isinstance(v, str) for v in value)


def controlnets_in(folder: Path, values: Any = None) -> list[str]:
    """The folders of the ControlNets that a pipeline folder has of its own: those of several are numbered.

    Args:
        folder: the pipeline folder.
        values: its index; None: it is read.
    """
    values = read_json(folder / INDEX, error=ModelLoadError, nonfinite=True) if values is None else values
    value: Any = values.get("controlnet") if isinstance(values, dict) else None
    if not is_pair(value) or value[1] is None:
        return []
    found = ["controlnet"]
    while value[1].startswith(MULTI) and (folder / (name := f"controlnet_{len(found)}")).is_dir():
        found.append(name)
    return found


def _check_library(index: Path, name: str, library: str, part: Path) -> None:
    """diffusers imports whatever library a model_index.json names; only its own and transformers' classes are meant."""
    if library in ("diffusers", "transformers", LIBRARY):
        return
    if library.isidentifier() and (part / f"{library}.py").is_file():
        return  # a file of its own needs diffusers' trust_remote_code
    found = importlib.util.find_spec("diffusers")
    pipelines = Path(found.origin).parent / "pipelines" if found is not None and found.origin else None
    if library.isidentifier() and pipelines is not None and (pipelines / library).is_dir():
        return
    raise ModelLoadError(
        f"{index}: {name} is of the library {printable(library[:60])!r}; components come from diffusers and "
        "transformers, others only with trust_remote_code=True"
    )


def _check_tokenizer(part: Path, encoder: Path, clip: bool) -> None:
    """Without its files a tokenizer is made up, and every prompt means something else.

    Args:
        part: the tokenizer's folder.
        encoder: that of its text encoder.
        clip: it is CLIP's, whose length pipelines fill prompts up to.
    """
    if not any(any(part.glob(pattern)) for pattern in _VOCABULARIES):
        raise ModelLoadError(f"{part} has no vocabulary (tokenizer.json, vocab.json, …)")
    if (part / "vocab.json").is_file() and not any((part / n).is_file() for n in ("tokenizer.json", "merges.txt")):
        raise ModelLoadError(f"{part} has a vocab.json without its merges.txt")
    file = part / "tokenizer_config.json"
    length = _table(file).get("model_max_length") if file.is_file() else None
    config = encoder / "config.json"
    most = _table(config).get("max_position_embeddings") if is_there(config, "file") else None
    most = most if clip and type(most) is int else None
    if most is not None and (type(length) is not int or not 1 <= length <= most):
        _refuse(file, "model_max_length", length, f"a whole number from 1 to {most}, the length of its text encoder")
    if length is not None and (type(length) not in (int, float) or length < 1):
        _refuse(file, "model_max_length", length, "a number of at least 1")


# ---------------------------------------------------------------------- numbers
def check_config(values: dict[str, Any], where: Path | str) -> None:
    """Refuse numbers of a configuration with which nothing can be built or drawn.

    Raises:
        ModelLoadError: a number of layers or timesteps, a factor or a β out of its bounds; with the key.
    """
    for key, value in _numbers(values):
        name = key.rpartition(".")[2]
        unbounded = name in _UNBOUNDED or "_class_name" not in values  # transformers has keys of its own
        if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not unbounded)):
            _refuse(where, key, value, "finite")
        if abs(value) > NUMBER_LIMIT and (isinstance(value, int) or not unbounded):
            _refuse(where, key, value, f"at most {NUMBER_LIMIT}")
        words = name.split("_")
        if "eps" in words and not 0 <= value <= 1:
            _refuse(where, key, value, "from 0 to 1")
        if value < 0 and "_class_name" in values and key in values and any(word in words for word in _COUNTS):
            _refuse(where, key, value, "at least 0")
        if any(word in words for word in _LAYERS) and value > LAYERS_LIMIT:
            _refuse(where, key, value, f"at most {LAYERS_LIMIT}")
    factor = values.get("scaling_factor", 1)
    unset = factor is None and values.get("_class_name") != "AutoencoderKL"
    least, most = FACTOR_LIMITS
    if not unset and (type(factor) not in (int, float) or not least <= abs(factor) <= most):
        _refuse(where, "scaling_factor", factor, f"a number other than 0, from {least:g} to {most:g}")
    for key, low in (("latents_std", least), ("shift_factor", 0), ("latents_mean", 0)):
        found = values.get(key)
        if not all(type(n) in (int, float) and low <= abs(n) <= most for n in _as_list(found)):
            _refuse(where, key, found, f"numbers from {low:g} to {most:g}" + (" other than 0" if low else ""))
    offset = values.get("steps_offset")
    if offset is not None and (type(offset) is not int or not 0 <= offset <= TIMESTEPS_LIMIT):
        _refuse(where, "steps_offset", offset, f"a whole number from 0 to {TIMESTEPS_LIMIT}")
    for pixels in _as_list(values.get("downsample_padding")):
        if type(pixels) is not int or not 0 <= pixels <= PADDING_LIMIT:
            _refuse(where, "downsample_padding", pixels, f"a whole number from 0 to {PADDING_LIMIT}")
    steps = values.get("num_train_timesteps")
    if steps is not None and (type(steps) is not int or not 1 <= steps <= TIMESTEPS_LIMIT):
        _refuse(where, "num_train_timesteps", steps, f"a whole number from 1 to {TIMESTEPS_LIMIT}")
    for side in _as_list(values.get("sample_size")):
        if type(side) not in (int, float) or not 0 < side <= SIDE_LIMIT:
            _refuse(where, "sample_size", side, f"from 1 to {SIDE_LIMIT}")
    for key, known in CHOICES.items():
        if values.get(key) is not None and values[key] not in known:
            _refuse(where, key, values[key], f"one of {', '.join(known)}")
    if not isinstance(values.get("quantization_config") or {}, dict):
        _refuse(where, "quantization_config", values["quantization_config"], "a table")
    betas = values.get("trained_betas")
    if isinstance(betas, list) and isinstance(steps, int) and len(betas) < steps:
        _refuse(where, "trained_betas", f"{len(betas)} numbers", f"as many as num_train_timesteps, {steps}")
    for key, found in (
        *((key, values.get(key)) for key in ("beta_start", "beta_end")),
        *(("trained_betas", beta) for beta in (betas if isinstance(betas, list) else [])),
    ):
        if found is not None and (type(found) not in (int, float) or not 0 <= found < 1):
            _refuse(where, key, found, "from 0 to less than 1")


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _numbers(values: object, key: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers in a table, with the names that lead to them."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from _numbers(value, key)
    elif isinstance(values, (int, float)) and not isinstance(values, bool):
        yield key, values


def _refuse(where: Path | str, key: str, value: object, allowed: str) -> None:
    raise ModelLoadError(f"{where}: {printable(key[:80])} must be {allowed}, got {printable(value)[:60]}")
