"""How well a pipeline draws, plain or accelerated: drawn images against real ones of the same captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusion_accel.arguments import nearest, public
from diffusion_accel.conditioning import CLASS, NOTHING, call_arguments, check_prompts_do, class_names, condition_of
from diffusion_accel.diffusers_compat import origin_of
from diffusion_accel.errors import ConfigurationError, UnsupportedPipelineError
from diffusion_accel.io import is_there, shown
from diffusion_accel.measure.request import MAX_SEED, listed, options_of, whole
from diffusion_accel.progress import Progress, silent
from diffusion_accel.training.images import save_grid

from .classifier import StickerClassifier, extract, load_classifier
from .drawing import drawing_quality
from .prompts import SPLITS, Asked, LoadImages, embedded_reference, of_classes, reference_of
from .validation import not_measurable, validation_loss

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LEAST = 4  # images; distances between distributions need a few
EMBEDDED = "embedded reference"


@dataclass(frozen=True)
class Evaluation:
    """How well a pipeline drew.

    Attributes:
        model: its name.
        data: the folder of the real images, or "embedded reference".
        real: how many real images there are.
        features: configuration of each feature of the pipeline, by name.
        parts: "train" and "heldout", each with the number of images "n", "frechet", "precision", "recall" and
            "retrieval" (see `evaluation.drawing`), and with a `data` folder "loss" by timestep.
        no_loss: why there is no validation loss although there is a `data` folder.
        images: what was drawn of each part, (N, 3, H, W) in -1..1.
    """

    model: str
    data: str
    real: int
    features: dict[str, Any]
    parts: dict[str, dict[str, Any]]
    no_loss: str | None = None
    images: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        found = {"model": self.model, "data": self.data, "real": self.real, "features": self.features, **self.parts}
        return found if self.no_loss is None else found | {"no_loss": self.no_loss}

    def write_grid(self, path: str | Path) -> None:
        """Write all images as one PNG or other image file, at most twelve in a row."""
        images = torch.cat([*self.images.values()])
        save_grid(images, min(12, len(images)), Path(path))


@public
def evaluate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str] | None = None,
    *,
    data: str | Path | None = None,
    count: int = 64,
    steps: int | None = None,
    seed: int = 100,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch: int = 16,
    progress: Progress = silent,
) -> Evaluation:
    """Measure how well a pipeline draws: distances to real images, whether it is what was asked for, validation loss.

        found = evaluate(load_pipeline("sticker"), count=32, steps=20)
        print(found.parts["heldout"]["frechet"])

    Fréchet distance (Heusel et al. 2017), precision and recall (Kynkäänniemi et al. 2019) are measured on the features
    of a small classifier of stickers: they are no FID, and compare only with numbers of the same count.

    Args:
        pipe: a loaded text-to-image or class-conditioned pipeline, with or without features.
        prompts: captions of the reference to draw, each once in its part; None: the first `count` of each part.
        data: folder of captioned real images, or of a folder for each class; None: the real stickers whose features
            ship with the embedded model.
        count: images to draw of each part, trained and held out; 4 or more. A part with fewer captions is left out.
        steps: denoising steps; None: the pipeline's own default, as for the next three.
        seed: image k of a part starts from the noise of seed + k.
        guidance_scale: 0 to 1000; 1 switches classifier-free guidance off.
        height, width: pixels.
        batch: images in a call.
        progress: told what is being drawn.

    Returns:
        The numbers of each part, and the images.

    Raises:
        ConfigurationError: a number that is not allowed, an argument that the pipeline does not take, a folder without
            captions, prompts that the reference does not show.
        UnsupportedPipelineError: the pipeline takes neither a prompt nor a class.
    """
    if data is not None and not is_there(data, "dir"):
        raise ConfigurationError(f"data: no such folder: {data}")
    whole("count", count, LEAST), whole("batch", batch), whole("seed", seed, 0, MAX_SEED)
    options = options_of(pipe, steps=steps, guidance_scale=guidance_scale, height=height, width=width)
    condition = condition_of(pipe)
    if condition == NOTHING:
        raise UnsupportedPipelineError(f"{type(pipe).__name__} takes neither a prompt nor a class")
    check_prompts_do(pipe)
    classifier, load = load_classifier(), None
    if data is None:
        asked, real = embedded_reference()
    else:
        asked, real, load = reference_of(Path(data), classifier)
    asked = of_classes(asked, class_names(pipe)) if condition == CLASS else asked
    chosen = _chosen(asked, None if prompts is None else listed(prompts), count)
    run = _Run(pipe, asked, classifier, load, options, seed, batch, height, width)
    images, parts = {}, {}
    for number, (split, indices) in enumerate(chosen.items()):
        images[split] = run.draw(indices, split, number / len(chosen), 1 / len(chosen), progress)
        values = drawing_quality(extract(classifier, images[split]), indices, asked, real)
        parts[split] = {"n": len(indices), **values, **run.loss(indices)}
    handle = getattr(pipe, "acceleration", None)
    return Evaluation(
        model=Path(origin_of(pipe) or type(pipe).__name__).name,
        data=EMBEDDED if data is None else str(data),
        real=len(real),
        features={} if handle is None else {name: f.to_dict() for name, f in handle.features.items()},
        parts=parts,
        no_loss=None if load is None else not_measurable(pipe),
        images=images,
    )


def _chosen(asked: Asked, prompts: Sequence[str] | None, count: int) -> dict[str, list[int]]:
    """The captions to draw, by their parts; a part with too few of them is left out."""
    if prompts is None:
        chosen = {split: asked.choose(split, count) for split in SPLITS}
    else:
        found = {caption: i for i, caption in reversed([*enumerate(asked.captions)])}
        for text in prompts:
            if text not in found:
                near = nearest(str(text), asked.captions)
                hint = f"did you mean {near!r}?" if near else "give captions of it"
                raise ConfigurationError(f"prompts: the reference does not show {shown(text)}; {hint}")
        indices = sorted({found[text] for text in prompts})
        chosen = {split: [i for i in indices if asked.splits[i] == split] for split in SPLITS}
    chosen = {split: indices for split, indices in chosen.items() if len(indices) >= LEAST}
    if prompts is not None and not chosen:
        raise ConfigurationError(f"prompts: {LEAST} or more of the trained or of the held-out captions are needed")
    return chosen


@dataclass(frozen=True)
class _Run:
    """The images and losses of one evaluation."""

    pipe: DiffusionPipeline
    asked: Asked
    classifier: StickerClassifier
    load: LoadImages | None
    options: dict[str, Any]
    seed: int
    batch: int
    height: int | None
    width: int | None

    def draw(self, indices: list[int], what: str, begun: float, share: float, progress: Progress) -> torch.Tensor:
        """One image a caption, (N, 3, H, W) in -1..1 on the CPU."""
        made = []
        for start in range(0, len(indices), self.batch):
            part = indices[start : start + self.batch]
            progress(f"{what}: {start} of {len(indices)} images", begun + share * start / len(indices))
            generators = [torch.Generator("cpu").manual_seed(self.seed + start + i) for i in range(len(part))]
            given = self.options | call_arguments(self.pipe, [self.asked.captions[i] for i in part])
            made.append(self.pipe(**given, generator=generators, output_type="pt").images.float().cpu() * 2 - 1)
        return torch.cat(made)

    def loss(self, indices: list[int]) -> dict[str, Any]:
        """The validation loss on the real images, where there are some and it can be measured."""
        if self.load is None or not_measurable(self.pipe) is not None:
            return {}
        captions = [self.asked.captions[i] for i in indices]
        return {"loss": validation_loss(self.pipe, self._fitted(self.load(indices)), captions)}

    def _fitted(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, h, w) resized to what the pipeline draws."""
        width = self.width or self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        size = (self.height or width, width)
        if tuple(images.shape[-2:]) == size:
            return images
        return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
