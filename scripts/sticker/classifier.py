"""Trains the sticker classifier: concept, group and style of a drawing, as a task of the shared loop."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from training_options import exit_if_stopped, report, settings_from
from training_setup import make_accelerator

from diffusion_accel.evaluation.classifier import HEADS, SIZE, Features, StickerClassifier, extract, save_classifier
from diffusion_accel.training import archives
from diffusion_accel.training.files import UsageError
from diffusion_accel.training.images import save_grid
from diffusion_accel.training.loop import Batch, train
from diffusion_accel.training.state import load_average

from . import data

STYLES = ("noto", "flat", "3d", "twemoji")
KEYS = {"concept": "slug", "group": "group", "style": "style"}


class ClassifierTask:
    """Cross-entropy of the three heads, equally weighted, with label smoothing 0.1.

    Images are shifted by up to `shift` pixels and scaled by up to a tenth, half of the ones in a batch stand on a
    random flat colour, and contrast and brightness vary a little; none is mirrored, since many have a left and a right.
    """

    def __init__(self, work: Path, shift: int = 6) -> None:
        self.images, self.rows, self.shift = data.load_images(work), data.load_rows(work), shift
        if self.images.shape[1] != SIZE:
            raise UsageError(f"the classifier sees {SIZE} pixels, the cache in {work} has {self.images.shape[1]}")
        classes = {head: sorted({row[KEYS[head]] for row in self.rows}) for head in HEADS}
        index = {head: {name: i for i, name in enumerate(names)} for head, names in classes.items()}
        self.labels = {head: torch.tensor([index[head][row[KEYS[head]]] for row in self.rows]) for head in HEADS}
        self.train, self.heldout = data.of_split(self.rows, "train"), data.of_split(self.rows, "heldout")
        torch.manual_seed(0)
        self.model = StickerClassifier(classes).to(memory_format=torch.channels_last)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """Shifted, scaled and shaded images, half of them on a random colour, with their labels."""
        chosen = rng.choice(self.train, size)
        background = rng.integers(0, 256, (size, 3)).astype(np.float32)
        background[rng.random(size) < 0.5] = 255
        shift = torch.from_numpy(rng.uniform(-self.shift, self.shift, (size, 2)) / (SIZE / 2)).float()
        scale = torch.from_numpy(rng.uniform(0.9, 1.1, size)).float()
        grid = torch.zeros(size, 2, 3)
        grid[:, 0, 0] = grid[:, 1, 1] = scale
        grid[:, :, 2] = shift
        images = archives.on_colours(self.images[chosen], background)
        grid = F.affine_grid(grid, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        contrast, light = (
            torch.from_numpy(rng.uniform(a, b, (size, 1, 1, 1))).float() for a, b in ((0.9, 1.1), (-0.1, 0.1))
        )
        labels = {head: self.labels[head][chosen] for head in HEADS}
        return {"images": (images * contrast + light).clamp(-1, 1)} | labels

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The mean of the three heads' cross-entropies."""
        logits = model(batch["images"])
        losses = [F.cross_entropy(logits[head].float(), batch[head], label_smoothing=0.1) for head in HEADS]
        return torch.stack(losses).mean()

    def evaluate(self) -> dict[str, Any]:
        """Top-1 accuracy of each head on the held-out images and on 500 trained ones."""
        result = {}
        for name, indices in (("train", self.train[:: max(1, len(self.train) // 500)]), ("heldout", self.heldout)):
            logits = [
                self.model(archives.on_colours(self.images[part])) for part in np.array_split(indices, 8) if len(part)
            ]
            for head in HEADS:
                found = torch.cat([part[head] for part in logits]).argmax(1)
                result[f"{head}_{name}"] = round(float((found == self.labels[head][indices]).float().mean()), 4)
        return result

    def preview(self, path: Path) -> None:
        """A batch as the network sees it."""
        save_grid(self.draw(np.random.default_rng(0), 24)["images"], 12, path)

    def features(self, indices: np.ndarray) -> Features:
        """Features of images on white."""
        parts = [
            extract(self.model, archives.on_colours(self.images[part]))
            for part in np.array_split(indices, 16)
            if len(part)
        ]
        rows = [self.rows[i] for i in indices]
        return Features(torch.cat(parts), [row["slug"] for row in rows], [row["style"] for row in rows])


def run(options: argparse.Namespace, tuned: dict[str, Any]) -> None:
    """Train the classifier, and write its weights, its classes and the features of the real stickers."""
    if options.threads:
        torch.set_num_threads(options.threads)
    accelerator = make_accelerator(options)
    task, folder = ClassifierTask(options.work), options.work / "classifier"
    settings = settings_from(tuned, options, options.steps)
    outcome = train(task, folder, settings, accelerator, resume=options.resume)
    exit_if_stopped(outcome, accelerator)
    if not outcome.finished or not accelerator.is_main_process:
        return
    load_average(folder, task.model, "classifier")
    task.model.half().float().eval()  # the features of the weights as they are written
    save_classifier(task.model, options.out)
    chosen = data.select(task.rows, STYLES)
    with torch.no_grad():
        accuracy, reference = task.evaluate(), task.features(chosen)
    save_file({"features": reference.values.half().contiguous()}, options.out / "reference.safetensors")
    drawn = set(data.read_concepts(options.concepts))
    rows = [task.rows[i] for i in chosen]
    known = {
        "concepts": reference.concepts,
        "styles": reference.styles,
        "captions": [archives.caption_of(row) for row in rows],
        "splits": [row["split"] if row["slug"] in drawn else "" for row in rows],
    }
    (options.out / "reference.json").write_text(json.dumps(known) + "\n", encoding="utf-8")
    report("classifier", step=outcome.step, out=str(options.out), reference=len(reference), **accuracy)
