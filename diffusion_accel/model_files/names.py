"""Which model is meant, and whether its files can be loaded: checks that need neither torch nor diffusers."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from diffusion_accel.arguments import nearest
from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.io import at_home, is_there, read_json, shown

from .folders import check_folder
from .headers import PICKLE_SUFFIXES, check_regular, check_weights, safetensors_header
from .index_notes import INDEX, recommended_by

__all__ = ["EMBEDDED", "EmbeddedModel", "ModelSource", "check_weights", "find_model", "safetensors_header"]

TRANSPARENCY = "transparency"  # folder beside a model's own parts: weights of latent transparency
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that ships inside this package.

    Attributes:
        name: what users type.
        summary: what it draws.
        licence: of the weights, with the attributions in the model card.
        example: a prompt in the form of its training captions.
    """

    name: str
    summary: str
    licence: str
    example: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recommended settings, by the names of the CLI."""
        return recommended_by(self.path)

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
    ),
    "sticker-dit": EmbeddedModel(
        name="sticker-dit",
        summary="the same concepts and styles by a transformer: flow matching, a FluxPipeline",
        licence="Apache-2.0, MIT and CC-BY-4.0 artwork, see the model card",
        example="red apple, 3d style",
    ),
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: `kind` is "embedded", "folder", "file" or "hub"; `location` what to load."""

    kind: str
    name: str
    location: str

    @property
    def defaults(self) -> dict[str, Any]:
        """Recommended settings, of a local pipeline; empty where diffusers' own defaults apply."""
        return recommended_by(self.location) if self.kind in ("embedded", "folder") else {}


def find_model(model: str, allow_pickle: bool = False) -> ModelSource:
    """Resolve an embedded name, a pipeline folder, a single `.safetensors` file or a hub id, and check local files.

    Raises:
        ConfigurationError: the name is none of these.
        ModelLoadError: a local file or folder is missing, broken, or would need pickle (unless `allow_pickle`).
    """
    if not isinstance(model, (str, os.PathLike)):
        raise ConfigurationError(f"a model is a name, a folder, a file or a hub id, got {shown(model)}")
    model = os.fspath(model)
    if model in EMBEDDED:
        return ModelSource("embedded", model, str(EMBEDDED[model].path))
    path = at_home(model)
    if model.strip() and is_there(path, "dir"):
        check_folder(path, allow_pickle)
        return ModelSource("folder", path.resolve().name, str(path))
    if model.strip() and is_there(path, "any"):
        check_regular(path)
        check_weights(path, allow_pickle)
        return ModelSource("file", path.stem, str(path))
    if model.startswith((".", "/", "~")) or path.suffix in PICKLE_SUFFIXES | {".safetensors"} or model.count("/") > 1:
        raise ModelLoadError(f"no such model file or folder: {model}")
    if HUB_ID.fullmatch(model):
        return ModelSource("hub", model, model)
    near = nearest(model, EMBEDDED)
    hint = f"did you mean {near!r}?" if near else f"embedded models: {', '.join(EMBEDDED)}"
    raise ConfigurationError(
        f"unknown model {model[:200]!r}; {hint}; a hub id (owner/name), a pipeline folder or a .safetensors file work "
        "as well"
    )


def pipeline_name(source: ModelSource) -> str | None:
    """The name of the pipeline class of a local folder; None for other sources."""
    if source.kind not in ("embedded", "folder"):
        return None
    values = read_json(Path(source.location) / INDEX, error=ModelLoadError, nonfinite=True)
    name = values.get("_class_name") if isinstance(values, dict) else None
    return name if isinstance(name, str) else None
