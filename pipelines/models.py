"""Which model is meant, and whether its files can be loaded: checks that need neither torch nor diffusers."""

from __future__ import annotations

import difflib
import json
import re
import struct
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.io import at_home, is_there, read_json

PICKLE_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})
TRANSPARENCY = "transparency"  # folder beside a model's own parts: weights of latent transparency
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that ships inside this package.

    Attributes:
        name: what users type.
        summary: what it draws.
        licence: of the weights, with the attributions in the model card.
        example: a prompt in the form of its training captions.
        settings: the recommended settings, by the names of the CLI.
    """

    name: str
    summary: str
    licence: str
    example: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The diffusers pipeline folder."""
        return Path(str(resources.files("diffusion_accel.assets"))) / self.name

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())


EMBEDDED: dict[str, EmbeddedModel] = {
    "sticker": EmbeddedModel(
        name="sticker",
        summary="369 emoji-like concepts in the styles 3d, flat, noto and twemoji, 96x96 pixels on white",
        licence="Apache-2.0, MIT and CC-BY-4.0 artwork, see the model card",
        example="red apple, 3d style",
        settings={"width": 96, "height": 96, "steps": 20, "guidance_scale": 3.0, "scheduler": "dpm++"},
    )
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: `kind` is "embedded", "folder", "file" or "hub"; `location` what to load."""

    kind: str
    name: str
    location: str

    @property
    def defaults(self) -> dict[str, Any]:
        """Recommended settings; empty where diffusers' own defaults apply."""
        return dict(EMBEDDED[self.name].settings) if self.kind == "embedded" else {}


def find_model(model: str, allow_pickle: bool = False) -> ModelSource:
    """Resolve an embedded name, a pipeline folder, a single `.safetensors` file or a hub id, and check local files.

    Raises:
        ConfigurationError: the name is none of these.
        ModelLoadError: a local file or folder is missing, broken, or would need pickle (unless `allow_pickle`).
    """
    if model in EMBEDDED:
        return ModelSource("embedded", model, str(EMBEDDED[model].path))
    path = at_home(model)
    if model.strip() and is_there(path, "dir"):
        check_folder(path, allow_pickle)
        return ModelSource("folder", path.resolve().name, str(path))
    if is_there(path, "file"):
        check_weights(path, allow_pickle)
        return ModelSource("file", path.stem, str(path))
    if model.startswith((".", "/", "~")) or path.suffix in PICKLE_SUFFIXES | {".safetensors"} or model.count("/") > 1:
        raise ModelLoadError(f"no such model file or folder: {model}")
    if _HUB_ID.fullmatch(model):
        return ModelSource("hub", model, model)
    near = difflib.get_close_matches(model, EMBEDDED, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"embedded models: {', '.join(EMBEDDED)}"
    raise ConfigurationError(
        f"unknown model {model[:200]!r}; {hint}; a hub id (owner/name), a pipeline folder or a .safetensors file work "
        "as well"
    )


def pipeline_name(source: ModelSource) -> str | None:
    """The name of the pipeline class of a local folder; None for other sources."""
    if source.kind not in ("embedded", "folder"):
        return None
    values = read_json(Path(source.location) / "model_index.json", error=ModelLoadError, nonfinite=True)
    name = values.get("_class_name") if isinstance(values, dict) else None
    return name if isinstance(name, str) else None


def check_folder(folder: Path, allow_pickle: bool = False) -> None:
    """Check that `folder` is a diffusers pipeline whose weights are whole safetensors files."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelLoadError(f"{folder} is not a diffusers pipeline folder: it has no model_index.json")
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{index} is not valid JSON: {error}") from error
    if not isinstance(components, dict) or "_class_name" not in components:
        raise ModelLoadError(f"{index} names no pipeline class (_class_name)")
    for name in components:
        part = folder / name
        if not part.is_dir() or part.resolve().parent != folder.resolve():
            continue
        weights = sorted(part.glob("*.safetensors"))
        for file in weights:
            check_weights(file)
        pickles = sorted(f.name for f in part.iterdir() if f.suffix in PICKLE_SUFFIXES)
        if pickles and not weights and not allow_pickle:
            check_weights(part / pickles[0])


def check_weights(file: Path, allow_pickle: bool = False) -> None:
    """Check one weights file: safetensors whose header and length agree, or a pickle that was allowed."""
    if file.suffix in PICKLE_SUFFIXES:
        if allow_pickle:
            return
        raise ModelLoadError(
            f"{file} is a pickle, which can run code when loaded; convert it to safetensors, "
            "or allow it with --allow-pickle (allow_pickle=True) if you trust its source"
        )
    if file.suffix != ".safetensors":
        raise ModelLoadError(f"{file} is not a model: expected a .safetensors file or a diffusers pipeline folder")
    safetensors_header(file)


def safetensors_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file (tensor name -> dtype, shape, data_offsets), checked against its length."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise ModelLoadError(f"{file} is not a whole safetensors file: its header is missing or cut off")
            header = json.loads(stream.read(length))
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{file} is not a safetensors file: its header cannot be read") from error
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror}") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        state = "cut off" if size < expected else "longer than its header says"
        raise ModelLoadError(f"{file} is {state}: {size} bytes instead of {expected}; get a fresh copy")
    return header
