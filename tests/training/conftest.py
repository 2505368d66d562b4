"""The tiny data set of these tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_training import COLOURS, DIT, UNET


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same thirty images as a folder, as three classes and with captions; a tiny VAE and model settings."""
    root = tmp_path_factory.mktemp("pictures")
    rows = []
    for c, name in enumerate(COLOURS):
        for folder in (root / "folder", root / "classes" / name, root / "captions"):
            folder.mkdir(parents=True, exist_ok=True)
        for i in range(10):
            pixels = np.full((20, 24, 3), 255, np.uint8)
            pixels[4:12, i : i + 8] = 0
            pixels[4:12, i : i + 8, c] = 250
            for file in (root / "folder" / f"{name}{i}.png", root / "classes" / name / f"{i}.png"):
                Image.fromarray(pixels).save(file)
            Image.fromarray(pixels).save(root / "captions" / f"{name}{i}.png")
            rows.append({"file": f"{name}{i}.png", "caption": f"a {name} box"})
    (root / "captions" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from zoo import vae

    vae().save_pretrained(root / "vae")
    (root / "unet.json").write_text(json.dumps(UNET))
    (root / "dit.json").write_text(json.dumps(DIT))
    text = {"block_out_channels": [8, 16], "norm_num_groups": 4, "down_block_types": ["DownBlock2D"] * 2}
    (root / "text.json").write_text(json.dumps(text | {"up_block_types": ["UpBlock2D"] * 2}))
    return root
