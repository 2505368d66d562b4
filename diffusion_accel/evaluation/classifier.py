"""The small classifier of stickers whose features the distribution distances are measured on.

It ships with the embedded model and knows emoji-like drawings and nothing else: its distances compare models of such
drawings with each other. They are no FID, which is measured on another network's features of photographs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from diffusion_accel import io
from diffusion_accel.errors import ModelLoadError
from diffusion_accel.model_files import tensors

SIZE = 96  # pixels on a side of what the network sees
WIDTHS = (48, 96, 192)
FEATURES = 128
HEADS = ("concept", "group", "style")


class ResidualBlock(nn.Module):
    """Two convolutions (N, C, H, W) -> the same shape, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> the same shape."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


class StickerClassifier(nn.Module):
    """Images (N, 3, 96, 96) in -1..1 on white -> logits of concept, group and style.

    A residual network of three levels (24, 12 and 6 pixels); its `features` (N, 128) lie before the heads.
    """

    def __init__(self, classes: dict[str, list[str]]) -> None:
        super().__init__()
        self.classes, self.size = classes, SIZE
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 4, stride=4)]
        for i, width in enumerate(WIDTHS):
            if i:
                layers.append(nn.Conv2d(WIDTHS[i - 1], width, 3, stride=2, padding=1))
            layers.append(ResidualBlock(width))
        self.body = nn.Sequential(*layers, nn.GroupNorm(8, WIDTHS[-1]), nn.SiLU())
        self.feature = nn.Linear(2 * WIDTHS[-1], FEATURES)
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(classes[name])) for name in HEADS})

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 128): mean and maximum over the image, projected."""
        hidden = self.body(images.contiguous(memory_format=torch.channels_last)).flatten(2)
        return self.feature(torch.cat([hidden.mean(2), hidden.amax(2)], 1))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits (N, classes) by head."""
        hidden = F.silu(self.features(images))
        return {name: head(hidden) for name, head in self.heads.items()}


def save_classifier(model: StickerClassifier, folder: Path) -> None:
    """Write float16 weights and the class names."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "classes.json").write_text(json.dumps(model.classes, indent=0) + "\n", encoding="utf-8")


def asset_folder() -> Path:
    """Where the classifier that ships lies."""
    return Path(str(resources.files("diffusion_accel.assets"))) / "sticker-features"


def load_classifier(folder: Path | None = None) -> StickerClassifier:
    """The classifier of a folder; by default the one that ships. In float32, in evaluation mode."""
    folder = folder or asset_folder()
    with _reading(folder, "sticker classifier"):
        classes = io.read_json(folder / "classes.json", error=ModelLoadError)
        if not isinstance(classes, dict) or not all(_texts(classes.get(head)) and classes[head] for head in HEADS):
            raise ModelLoadError(f"{folder / 'classes.json'} holds no names of {', '.join(HEADS)}")
        weights = _finite(folder / "model.safetensors")
        model = StickerClassifier(classes)
        model.load_state_dict(weights)
    return model.float().eval()


@dataclass(frozen=True)
class Features:
    """Features of images: (N, 128), with what is known of each image."""

    values: torch.Tensor
    concepts: list[str]
    styles: list[str]

    def __len__(self) -> int:
        return len(self.values)

    def only(self, keep: list[int]) -> Features:
        """Those of some of the images."""
        return Features(self.values[keep], [self.concepts[i] for i in keep], [self.styles[i] for i in keep])


@torch.no_grad()
def extract(model: StickerClassifier, images: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Features (N, 128) of images (N, 3, H, W) in -1..1 of any size."""
    parts = []
    for part in images.float().split(batch):
        if part.shape[-2:] != (SIZE, SIZE):
            part = F.interpolate(part, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        parts.append(model.features(part))
    return torch.cat(parts) if parts else torch.zeros(0, FEATURES)


def load_reference(folder: Path | None = None) -> Features:
    """Features of the real stickers that ship with the classifier."""
    folder = folder or asset_folder()
    with _reading(folder, "reference features"):
        values = _finite(folder / "reference.safetensors").get("features", torch.zeros(0))
        rows: Any = io.read_json(folder / "reference.json", error=ModelLoadError)
        names = [rows.get(key, []) if isinstance(rows, dict) else [] for key in ("concepts", "styles")]
        if values.shape[1:] != (FEATURES,) or not all(_texts(one) and len(one) == len(values) for one in names):
            raise ModelLoadError(f"they are {FEATURES} numbers, a concept and a style of each")
    return Features(values.float(), *names)


@contextmanager
def _reading(folder: Path, what: str) -> Iterator[None]:
    """Say what a folder was to hold, whatever is wrong with it."""
    try:
        yield
    except (ModelLoadError, ValueError, KeyError, RuntimeError) as error:
        raise ModelLoadError(f"{folder} holds no {what}: {io.first_line(error)}") from error


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _finite(file: Path) -> dict[str, torch.Tensor]:
    found = tensors.read_tensors(file, error=ModelLoadError)
    tensors.check_values(found, file, ModelLoadError)
    return found
