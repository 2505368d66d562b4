"""The stages of transparency, in order, and their tuned settings."""

from __future__ import annotations

from typing import Any

ENCODER: dict[str, Any] = {"steps": 1500, "batch": 16, "lr": 1.5e-3, "warmup": 100, "cooldown": 0.8, "curve": "cosine"}
ENCODER |= {"ema": 0.998, "weight_decay": 1e-3, "eval_every": 250, "grid_every": 0}
DECODER = ENCODER | {"steps": 8000, "grid_every": 500}
JOINT = DECODER | {"steps": 4000, "batch": 8, "lr": 1e-3, "cooldown": 0.7}
UNET: dict[str, Any] = {"steps": 3000, "batch": 64, "lr": 1.5e-3, "warmup": 100, "cooldown": 0.8, "curve": "cosine"}
UNET |= {"eval_every": 250, "grid_every": 500}
REFINE = DECODER | {"steps": 1600, "batch": 8, "lr": 6e-4, "warmup": 50, "cooldown": 0.9}
TUNED = {"encoder": ENCODER, "decoder": DECODER, "joint": JOINT, "unet": UNET, "refine": REFINE}
ORDER = ("encoder", "decoder", "joint", "latents", "unet", "refine", "export")
