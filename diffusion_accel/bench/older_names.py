"""A pipeline's folder for environments with an older transformers: CLIP's tensors were named `text_model.…` before 5.6,
and an older version fills those that it does not find with random numbers."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from diffusion_accel.io import read_json

WEIGHTS = "model.safetensors"
_PREFIX, _OUTSIDE = "text_model.", "text_projection."


def with_older_names(location: str, folder: Path) -> str:
    """The same pipeline with its text encoders under their older names.

    Args:
        location: the pipeline's folder; anything else (an id of the hub) is returned as it is.
        folder: a new folder, in which links to all other parts are made.
    """
    if not Path(location).is_dir():
        return location
    for part in Path(location).resolve().iterdir():
        if not _is_newer(part):
            (folder / part.name).symlink_to(part)
            continue
        (folder / part.name).mkdir()
        for file in part.iterdir():
            if file.name != WEIGHTS:
                (folder / part.name / file.name).symlink_to(file)
        tensors = load_file(part / WEIGHTS)
        named = {k if k.startswith(_OUTSIDE) else _PREFIX + k: v for k, v in tensors.items()}
        save_file(named, folder / part.name / WEIGHTS, {"format": "pt"})
    return str(folder)


def _is_newer(part: Path) -> bool:
    """Whether a part is a CLIP text encoder whose tensors have their newer names."""
    if not (part / WEIGHTS).is_file() or not (part / "config.json").is_file():
        return False
    kind = str((read_json(part / "config.json").get("architectures") or [""])[0])
    return kind.startswith("CLIPText") and not any(name.startswith(_PREFIX) for name in load_file(part / WEIGHTS))
