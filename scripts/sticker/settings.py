"""The stages of the sticker model, in order, and their tuned settings."""

from __future__ import annotations

from typing import Any

# Tuned settings: those of the shipped weights. About eight hours of one core with AMX in bf16.
DECODER = {"steps": 17000, "batch": 16, "lr": 1.5e-3, "warmup": 50, "cooldown": 0.7, "curve": "cosine"}
DECODER |= {"weight_decay": 1e-3, "eval_every": 500, "grid_every": 2000}
TEXT = {"steps": 6000, "batch": 64, "lr": 1e-3, "beta2": 0.98, "eval_every": 200, "grid_every": 1000}
DENOISER = {"steps": 10000, "batch": 64, "lr": 1e-3, "warmup": 150, "eval_every": 250, "grid_every": 1000}
FINISH = DENOISER | {"steps": 7000, "lr": 6e-4, "warmup": 50, "cooldown": 1.0, "cycles": 2}
TUNED: dict[str, dict[str, Any]] = {"decoder": DECODER, "text": TEXT, "denoiser": DENOISER, "finish": FINISH}

ORDER = ("cache", "tokenizer", "latents", "decoder", "text", "denoiser", "finish", "export", "grid", "evaluate")
