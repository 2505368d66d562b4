"""The three trained stages of the sticker model: decoder, text encoder, UNet. Each is a `Task` of the shared loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from . import sticker_data as data
from .denoising import TIMESTEPS, add_noise, alphas_cumprod, draw_timesteps, nearest_noise
from .files import TrainingError, require
from .latents import PATCH, PatchCodec
from .loop import Batch
from .pictures import psnr, save_grid
from .sticker_models import (
    ConditionalDenoiser,
    Shape,
    TextToLatents,
    build_pipeline,
    build_text_encoder,
    build_unet,
    build_vae,
)

PREVIEWS = 24  # pictures in a preview


def sample_of(indices: np.ndarray, size: int, seed: int) -> np.ndarray:
    """A fixed random sample of the indices, for evaluation."""
    return indices[np.random.default_rng(seed).permutation(len(indices))[:size]]


class DecoderTask:
    """Latents of the patch codec -> pictures: trains the decoder of the VAE on crops of all pictures.

    Loss: MSE + 0.25 L1 + 0.25 L1 of the gradients. A share `coloured` of the crops stands on a random flat colour, so
    that the decoder learns edges and not only white. Latents get Gaussian noise of a standard deviation drawn from
    0..`noise` (they have unit RMS), since a denoiser's latents are not exact either.
    """

    def __init__(self, work: Path, crop: int = 48, noise: float = 0.15, coloured: float = 0.4) -> None:
        shape = Shape.of_work(work)
        self.images, rows = data.load_images(work), data.load_rows(work)
        self.codec = PatchCodec.load(work / "codec.safetensors")
        self.crop, self.noise, self.coloured = min(crop, shape.size), noise, coloured
        self.train = data.of_split(rows, "train")
        self.heldout = data.of_split(rows, "heldout")[:96]
        weights = np.array([2.0 if rows[i]["core"] else 1.0 for i in self.train])
        self.weights = weights / weights.sum()
        torch.manual_seed(0)
        self.model = build_vae(shape).decoder.to(memory_format=torch.channels_last)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        chosen = rng.choice(self.train, size, p=self.weights)
        flips = rng.random(size) < 0.5
        corners = rng.integers(0, self.images.shape[1] - self.crop + 1, (size, 2))
        crops = []
        for i, flip, (y, x) in zip(chosen, flips, corners, strict=True):
            crop = self.images[i, y : y + self.crop, x : x + self.crop]
            crops.append(crop[:, ::-1] if flip else crop)
        background = rng.integers(0, 256, (size, 3)).astype(np.float32)
        background[rng.random(size) >= self.coloured] = 255
        pictures = data.composite(np.stack(crops), background)
        latents = self.codec.encode(pictures)
        deviation = self.noise * torch.from_numpy(rng.random((size, 1, 1, 1), dtype=np.float32))
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        return {"pictures": pictures, "latents": latents + deviation * noise}

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        error = model(batch["latents"].contiguous(memory_format=torch.channels_last)).float() - batch["pictures"]
        gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return (error**2).mean() + 0.25 * error.abs().mean() + 0.25 * gradients

    def reconstruct(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures on white, and their reconstructions."""
        pictures = data.composite(self.images[np.sort(indices)])
        device = next(self.model.parameters()).device
        decoded = [self.model(self.codec.encode(part).to(device)).float().cpu() for part in pictures.split(16)]
        return pictures, torch.cat(decoded).clamp(-1, 1)

    def evaluate(self) -> dict[str, Any]:
        """PSNR in dB of whole pictures on white: 96 held-out ones and 96 of the trained ones."""
        result = {"psnr_train": psnr(*self.reconstruct(sample_of(self.train, 96, seed=0)))}
        if len(self.heldout):
            result["psnr_heldout"] = psnr(*self.reconstruct(self.heldout))
        return result

    def preview(self, path: Path) -> None:
        """Rows of originals over rows of reconstructions."""
        shown = self.heldout if len(self.heldout) else self.train
        originals, decoded = self.reconstruct(shown[:PREVIEWS])
        rows = [part for pair in zip(originals.split(12), decoded.split(12), strict=True) for part in pair]
        columns = min(12, len(originals))
        save_grid(torch.cat(rows), columns, path)


@dataclass
class Captioned:
    """The pictures that the text encoder and the UNet are trained on: latents, token ids and rows."""

    shape: Shape
    codec: PatchCodec
    rows: list[data.Row]
    latents: torch.Tensor  # (N, C, h, w)
    ids: torch.Tensor  # int32 (N, data.VARIANTS, tokens)
    empty: torch.Tensor  # int32 (tokens), the empty text
    train: np.ndarray
    heldout: np.ndarray

    @classmethod
    def load(cls, work: Path) -> Captioned:
        stored = load_file(require(work / "latents.safetensors", "latents"))
        tokens, indices = data.load_tokens(work), stored["indices"]
        rows = data.load_rows(work)
        rows = [rows[i] for i in indices.tolist()]
        train, heldout = data.of_split(rows, "train"), data.of_split(rows, "heldout")
        if not len(train):
            raise TrainingError("every picture of these styles and concepts is held out: nothing to train on")
        codec = PatchCodec.load(work / "codec.safetensors")
        ids = tokens["captions"][indices]
        return cls(Shape.of_work(work), codec, rows, stored["latents"], ids, tokens["empty"], train, heldout)

    def draw(self, rng: np.random.Generator, size: int, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and token ids of random training pictures; a share `dropout` gets the empty text."""
        chosen = rng.choice(self.train, size)
        ids = self.ids[chosen, rng.integers(0, data.VARIANTS, size)].long()
        ids[torch.from_numpy(rng.random(size) < dropout)] = self.empty.long()
        return self.latents[chosen], ids

    def preview_indices(self) -> np.ndarray:
        """Up to 18 trained and 6 held-out pictures."""
        heldout = sample_of(self.heldout, PREVIEWS // 4, seed=2)
        return np.concatenate([sample_of(self.train, PREVIEWS - len(heldout), seed=2), heldout])


class TextTask:
    """Pre-trains the text encoder to draw: caption -> mean latents, by MSE.

    Without it the denoiser binds text to pictures slowly: a whole UNet step moves the text encoder a little, while here
    one core sees hundreds of captions a second.
    """

    def __init__(self, work: Path) -> None:
        self.captioned = Captioned.load(work)
        torch.manual_seed(0)
        shape = self.captioned.shape
        if shape.latent_size % 2:
            raise TrainingError(f"the picture side must be a multiple of {2 * PATCH} pixels, got {shape.size}")
        self.model = TextToLatents(build_text_encoder(shape, data.load_tokenizer(work)), shape)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        latents, ids = self.captioned.draw(rng, size, dropout=0.0)
        return {"latents": latents, "ids": ids}

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return F.mse_loss(model(batch["ids"]).float(), batch["latents"])

    def predict(self, indices: np.ndarray) -> torch.Tensor:
        device = next(self.model.parameters()).device
        ids = self.captioned.ids[indices, 0].long().to(device)
        return torch.cat([self.model(part).float().cpu() for part in ids.split(64)])

    def evaluate(self) -> dict[str, Any]:
        """MSE of up to 256 trained and all held-out pictures with their canonical captions; 1.0 is the mean square."""
        sets = {"mse_train": self.captioned.train[:256], "mse_heldout": self.captioned.heldout}
        return {
            name: float(F.mse_loss(self.predict(indices), self.captioned.latents[indices]))
            for name, indices in sets.items()
            if len(indices)
        }

    def preview(self, path: Path) -> None:
        pictures = self.captioned.codec.decode(self.predict(self.captioned.preview_indices()))
        save_grid(pictures, 6, path)


def v_error(denoise: ConditionalDenoiser, latents: torch.Tensor, ids: torch.Tensor, seed: int = 7) -> dict[str, Any]:
    """Mean square error of the v prediction over all noise levels: {"quarters": [...], "mean": ...}.

    The timesteps of the N samples are spread evenly over 0..999, in order; a quarter is a fourth of the samples, so the
    first is t < 250. 1.0 is about the error of predicting zero.
    """
    n, device = len(latents), next(denoise.parameters()).device
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    timesteps = ((torch.arange(n) + 0.5) / n * TIMESTEPS).long()
    noisy, target = add_noise(latents, noise, timesteps, alphas_cumprod())
    parts = zip(noisy.split(32), timesteps.split(32), ids.long().split(32), strict=True)
    predicted = [denoise(*(value.to(device) for value in part)).float().cpu() for part in parts]
    errors = ((torch.cat(predicted) - target) ** 2).mean((1, 2, 3))
    quarters = [float(part.mean()) for part in errors[: n // 4 * 4].view(4, -1)] if n >= 4 else []
    return {"quarters": [round(value, 4) for value in quarters], "mean": round(float(errors.mean()), 4)}


class UNetTask:
    """Trains the UNet and the text encoder together, by the v-prediction error.

    Args:
        work: the work folder.
        text: weights of the pre-trained text encoder; None starts from random ones.
        dropout: share of empty captions (classifier-free guidance, Ho and Salimans 2022).
        candidates: see `nearest_noise`.
        t_mean: see `draw_timesteps`.
    """

    def __init__(
        self,
        work: Path,
        text: dict[str, torch.Tensor] | None = None,
        dropout: float = 0.1,
        candidates: int = 4,
        t_mean: float = 0.0,
    ) -> None:
        self.captioned, self.tokenizer = Captioned.load(work), data.load_tokenizer(work)
        self.dropout, self.candidates, self.t_mean = dropout, candidates, t_mean
        self.alphas = alphas_cumprod()
        torch.manual_seed(0)
        shape = self.captioned.shape
        encoder = build_text_encoder(shape, self.tokenizer)
        self.model = ConditionalDenoiser(encoder, build_unet(shape))
        if text is not None:
            encoder.load_state_dict(text)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        latents, ids = self.captioned.draw(rng, size, self.dropout)
        timesteps = draw_timesteps(rng, size, mean=self.t_mean)
        noise = nearest_noise(rng, latents, self.candidates)
        noisy, target = add_noise(latents, noise, timesteps, self.alphas)
        return {"noisy": noisy, "target": target, "timesteps": timesteps, "ids": ids}

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return F.mse_loss(model(batch["noisy"], batch["timesteps"], batch["ids"]).float(), batch["target"])

    def evaluate(self) -> dict[str, Any]:
        """`v_error` of up to 128 trained and 128 held-out pictures with their canonical captions."""
        result = {}
        for name, indices in (("v_train", self.captioned.train), ("v_heldout", self.captioned.heldout)):
            chosen = sample_of(indices, 128, seed=3)
            if len(chosen):
                result[name] = v_error(self.model, self.captioned.latents[chosen], self.captioned.ids[chosen, 0])
        return result

    def preview(self, path: Path) -> None:
        """Samples of trained and, at the end, held-out captions, decoded by the linear decoder of the codec."""
        from diffusers import DPMSolverMultistepScheduler

        captioned = self.captioned
        vae = build_vae(captioned.shape).to(next(self.model.parameters()).device)  # only for its scale factor
        pipeline = build_pipeline(vae, self.model.text, self.tokenizer, self.model.unet)
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        captions = [data.caption_variants(captioned.rows[i])[0] for i in captioned.preview_indices()]
        generators = [torch.Generator().manual_seed(i) for i in range(len(captions))]
        arguments = {"num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "latent"}
        latents = pipeline(captions, generator=generators, **arguments).images
        save_grid(captioned.codec.decode(latents.float().cpu()), 6, path)
