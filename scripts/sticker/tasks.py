"""What the sticker model is trained on, and its own two tasks: decoder and text encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from diffusion_accel.training import archives
from diffusion_accel.training.arrays import load_tensors
from diffusion_accel.training.diffusion_task import PREVIEWS, sample_of
from diffusion_accel.training.files import TrainingError, require
from diffusion_accel.training.images import image_loss, mean_psnr, save_grid
from diffusion_accel.training.loop import Batch

from . import data
from .flux import STATES_LENGTH, build_states_encoder
from .latents import PatchCodec
from .models import Shape, TextToLatents, build_text_encoder, build_vae

if TYPE_CHECKING:
    from transformers import CLIPTextModel, T5EncoderModel

LISTED = 3  # times as often as another image one of the concept list is drawn


class DecoderTask:
    """Latents of the patch codec -> images: trains the decoder of the VAE on crops of all images.

    Loss: MSE + 0.25 L1 + 0.25 L1 of the gradients. A share `coloured` of the crops stands on a random flat colour, so
    that the decoder learns edges and not only white. Latents get Gaussian noise of a standard deviation drawn from
    0..`noise` (they have unit RMS), since a denoiser's latents are not exact either.
    """

    def __init__(self, work: Path, crop: int = 48, noise: float = 0.3, coloured: float = 0.4) -> None:
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
        """Crops on white or a random colour, and their latents with noise."""
        chosen = rng.choice(self.train, size, p=self.weights)
        flips = rng.random(size) < 0.5
        corners = rng.integers(0, self.images.shape[1] - self.crop + 1, (size, 2))
        crops = []
        for i, flip, (y, x) in zip(chosen, flips, corners, strict=True):
            crop = self.images[i, y : y + self.crop, x : x + self.crop]
            crops.append(crop[:, ::-1] if flip else crop)
        background = rng.integers(0, 256, (size, 3)).astype(np.float32)
        background[rng.random(size) >= self.coloured] = 255
        images = archives.on_colours(np.stack(crops), background)
        latents = self.codec.encode(images)
        deviation = self.noise * torch.from_numpy(rng.random((size, 1, 1, 1), dtype=np.float32))
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        return {"images": images, "latents": latents + deviation * noise}

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """`image_loss` of what the decoder makes of the latents."""
        made = model(batch["latents"].contiguous(memory_format=torch.channels_last)).float()
        return image_loss(made - batch["images"])

    def reconstruct(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images on white, and their reconstructions."""
        images = archives.on_colours(self.images[np.sort(indices)])
        device = next(self.model.parameters()).device
        decoded = [self.model(self.codec.encode(part).to(device)).float().cpu() for part in images.split(16)]
        return images, torch.cat(decoded).clamp(-1, 1)

    def evaluate(self) -> dict[str, Any]:
        """PSNR in dB of whole images on white: 96 held-out ones and 96 of the trained ones."""
        result = {"psnr_train": mean_psnr(*self.reconstruct(sample_of(self.train, 96, seed=0)))}
        if len(self.heldout):
            result["psnr_heldout"] = mean_psnr(*self.reconstruct(self.heldout))
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
    """The images that the text encoder and the UNet are trained on (`Examples`): latents, token ids and rows."""

    shape: Shape
    codec: PatchCodec
    rows: list[data.Row]
    latents: torch.Tensor  # (N, C, h, w)
    ids: torch.Tensor  # int32 (N, data.VARIANTS, tokens)
    empty: torch.Tensor  # int32 (tokens), the empty text
    train: np.ndarray  # images of the concept list occur `LISTED` times, those around them once
    watched: np.ndarray
    heldout: np.ndarray
    variants: int = data.VARIANTS

    @classmethod
    def load(cls, work: Path) -> Captioned:
        """What the stages up to the latents left in a work folder."""
        stored = load_tensors(require(work / "latents.safetensors", "latents"), "latents", "indices")
        tokens, indices = data.load_tokens(work), stored["indices"]
        rows = data.load_rows(work)
        rows = [rows[i] for i in indices.tolist()]
        listed = int(stored.get("listed", torch.tensor(len(rows))))
        watched, heldout = data.of_split(rows, "train", range(listed)), data.of_split(rows, "heldout")
        around = np.arange(listed, len(rows))
        train = np.concatenate([watched] * LISTED + [around]) if len(around) else watched
        if not len(watched):
            raise TrainingError("every image of these styles and concepts is held out: nothing to train on")
        codec = PatchCodec.load(work / "codec.safetensors")
        ids = tokens["captions"][indices]
        shape, latents = Shape.of_work(work), stored["latents"]
        return cls(shape, codec, rows, latents, ids, tokens["empty"], train, watched, heldout)

    def listed(self) -> Captioned:
        """The images of the concept list alone."""
        return replace(self, train=self.watched)

    def clean(self, indices: torch.Tensor) -> torch.Tensor:
        """Latents (N, C, h, w) of some images."""
        return self.latents[indices]

    def condition(self, indices: torch.Tensor, variants: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        """Token ids (N, tokens) of some captions, the empty text where `dropped`."""
        ids = self.ids[indices, variants].long()
        ids[dropped] = self.empty.long()
        return ids

    def decode(self, clean: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in -1..1, by the codec."""
        return self.codec.decode(clean)

    def preview_indices(self) -> np.ndarray:
        """Up to 18 trained and 6 held-out images."""
        heldout = sample_of(self.heldout, PREVIEWS // 4, seed=2)
        return np.concatenate([sample_of(self.watched, PREVIEWS - len(heldout), seed=2), heldout])


class TextTask:
    """Pre-trains the text encoder to draw, a transformer's second one: caption -> mean latents, by MSE.

    Without it the denoiser binds text to images slowly: a whole UNet step moves the text encoder a little, while here
    one core sees hundreds of captions a second.
    """

    def __init__(self, work: Path) -> None:
        self.captioned = Captioned.load(work)
        torch.manual_seed(0)
        shape = self.captioned.shape
        if shape.latent_size % 2:
            raise TrainingError(f"the image side must be a multiple of {2 * shape.patch} pixels, got {shape.size}")
        encoder: CLIPTextModel | T5EncoderModel
        if shape.transformer_blocks:
            encoder = build_states_encoder(shape, len(data.load_states_tokenizer(work)))
            self.captioned = replace(self.captioned, ids=self.captioned.ids[..., -STATES_LENGTH:])
        else:
            encoder = build_text_encoder(shape, data.load_tokenizer(work))
        self.model = TextToLatents(encoder, shape)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """Captions and the latents of their images."""
        chosen = torch.from_numpy(rng.choice(self.captioned.train, size))
        variants = torch.from_numpy(rng.integers(0, self.captioned.variants, size))
        return {
            "latents": self.captioned.clean(chosen),
            "ids": self.captioned.ids[chosen, variants].long(),
        }

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Mean square error of the predicted latents."""
        return F.mse_loss(model(batch["ids"]).float(), batch["latents"])

    def predict(self, indices: np.ndarray) -> torch.Tensor:
        """The latents that the canonical captions of some images predict."""
        device = next(self.model.parameters()).device
        ids = self.captioned.ids[indices, 0].long().to(device)
        return torch.cat([self.model(part).float().cpu() for part in ids.split(64)])

    def evaluate(self) -> dict[str, Any]:
        """MSE of up to 256 trained and all held-out images with their canonical captions; 1.0 is the mean square."""
        sets = {"mse_train": self.captioned.watched[:256], "mse_heldout": self.captioned.heldout}
        return {
            name: float(F.mse_loss(self.predict(indices), self.captioned.latents[indices]))
            for name, indices in sets.items()
            if len(indices)
        }

    def preview(self, path: Path) -> None:
        """What captions predict, decoded."""
        images = self.captioned.codec.decode(self.predict(self.captioned.preview_indices()))
        save_grid(images, 6, path)
