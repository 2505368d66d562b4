"""What trains the pair: the encoder, the decoder, both together, and the decoder on what a denoiser draws."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffusion_accel.measure.fidelity import psnr
from diffusion_accel.training.arrays import load_tensors
from diffusion_accel.training.denoising import Process
from diffusion_accel.training.diffusion_task import Denoiser, sample_of
from diffusion_accel.training.files import UsageError, require
from diffusion_accel.training.images import image_loss, save_grid
from diffusion_accel.training.loop import Batch
from diffusion_accel.transparency.rgba import checkerboard, composite, on_grey, padded_rgb
from sticker import data
from sticker.latents import PATCH
from sticker.tasks import Captioned

from .images import rgba_of, with_margin
from .pair import STAGES, Pair, alpha_code, load_pair

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

QUIET = 4e-4  # mean square error in -1..1 (40 dB) below which a change of the VAE's reconstruction hardly counts


class EncoderTask:
    """Trains the encoder on crops of RGBA stickers, with the VAE frozen.

    Loss: identity, which is what the frozen VAE makes of the changed latents against the image over grey (MSE +
    0.25 L1 + 0.25 L1 of the gradients, as the VAE's own decoder was trained), and `guide` times the mean square
    distance of what the encoder adds from a linear code of alpha (`alpha_code`). From the reconstruction loss instead,
    the encoder learns to add next to nothing in the time there is: identity costs at once, while the decoder has not
    learnt to read, and alpha gets holes where an image is grey.
    """

    trained: tuple[str, ...] = ("encoder",)
    before: tuple[str, ...] = ()  # stages whose weights this one goes on with

    def __init__(
        self,
        work: Path,
        vae: AutoencoderKL,
        start: Path | None = None,
        crop: int = 64,
        guide: float = 2.0,
        noise: float = 0.15,
    ) -> None:
        self.images, rows = data.load_images(work), data.load_rows(work)
        self.crop, self.guide, self.noise = min(crop, self.images.shape[1]), guide, noise
        self.train = data.of_split(rows, "train")
        self.heldout = data.of_split(rows, "heldout")[:96]
        weights = np.array([2.0 if rows[i]["core"] else 1.0 for i in self.train])
        self.weights = weights / weights.sum()
        torch.manual_seed(0)
        self.model = Pair(vae)
        if self.before or start is not None:
            load_pair(work, self.model, self.before, start)
        for name, part in self.model.named_children():
            part.requires_grad_(name in self.trained)
        if self.crop % self.model.decoder.multiple:
            raise UsageError(f"crops must be a multiple of {self.model.decoder.multiple} pixels, got {crop}")

    @cached_property
    def code(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The linear code that the encoder is guided to, from 24 images."""
        rgb, alpha, _ = self.shown(self.train[:: max(1, len(self.train) // 24)])
        return alpha_code(self.model.vae, on_grey(rgb, alpha), alpha)

    def shown(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Straight colours, alpha and padded colours of whole images."""
        rgb, alpha = rgba_of(self.images, indices)
        return rgb, alpha, padded_rgb(rgb, alpha)

    def crops(self, rng: np.random.Generator, size: int) -> torch.Tensor:
        """Colours, alpha and padded colours of crops, half of them mirrored: (size, 7, crop, crop)."""
        whole = torch.cat(self.shown(rng.choice(self.train, size, p=self.weights)), 1)
        flips = rng.random(size) < 0.5
        corners = rng.integers(0, whole.shape[-1] - self.crop + 1, (size, 2))
        made = []
        for image, flip, (y, x) in zip(whole, flips, corners, strict=True):
            crop = image[:, y : y + self.crop, x : x + self.crop]
            made.append(crop.flip(-1) if flip else crop)
        return torch.stack(made)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """Crops: colours, alpha and padded colours, as one tensor."""
        return {"images": self.crops(rng, size)}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Identity of what the VAE decodes, and the distance of the offset from the code of alpha."""
        rgb, alpha, padded = batch["images"].split((3, 1, 3), 1)
        decoded, offset, _ = model(rgb, alpha, padded)
        kernel, bias = (part.to(alpha) for part in self.code)
        code = F.conv2d(alpha, kernel, bias, stride=PATCH)
        return image_loss(decoded.float() - on_grey(rgb, alpha)) + self.guide * F.mse_loss(offset.float(), code)

    # ------------------------------------------------------------------ watching
    def round_trip(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """Whole images through encoder, VAE and decoder (one view): what went in and what came out."""
        found: dict[str, list[torch.Tensor]] = {k: [] for k in ("rgb", "alpha", "made", "plain", "changed", "offset")}
        for part in np.array_split(np.sort(indices), math.ceil(len(indices) / 16)):
            rgb, alpha, padded = self.shown(part)
            mean, offset = self.model.encode(rgb, alpha, padded)
            plain, changed = (self.model.vae.decode(z).sample for z in (mean, mean + offset))
            made = self.model.decoder((changed / 2 + 0.5).clamp(0, 1), mean + offset).clamp(0, 1)
            for name, value in zip(found, (rgb, alpha, made, plain, changed, offset), strict=True):
                found[name].append(value.float())
        return {name: torch.cat(values) for name, values in found.items()}

    def evaluate(self) -> dict[str, Any]:
        """Medians over 96 held-out images, in dB: alpha, the worst of three backgrounds, and the VAE's own RGB."""
        shown = self.heldout if len(self.heldout) else sample_of(self.train, 96, seed=0)
        result = self.round_trip(shown)
        rgb, alpha, made = result["rgb"], result["alpha"], result["made"]
        height, width = alpha.shape[-2:]
        backgrounds = (0.0, 1.0, checkerboard(height, width, 8, 0.25, 0.75))
        composites = [
            _psnr(composite(made[:, 1:], made[:, :1], ground), composite(rgb, alpha, ground)) for ground in backgrounds
        ]
        target = on_grey(rgb, alpha) / 2 + 0.5
        plain, changed = (_psnr((result[k] / 2 + 0.5).clamp(0, 1), target) for k in ("plain", "changed"))
        values = {
            "alpha": _psnr(made[:, :1], alpha).median(),
            "composite": torch.stack(composites).amin(0).median(),
            "vae": plain.median(),
            "moved": (changed - plain).median(),
            "offset": (result["offset"] ** 2).mean().sqrt(),
        }
        return {name: round(float(value), 3) for name, value in values.items()}

    def preview(self, path: Path) -> None:
        """Rows: on a checkerboard, what came back, alpha, what came back."""
        shown = self.heldout if len(self.heldout) else self.train
        result = self.round_trip(shown[:12])
        height, width = result["alpha"].shape[-2:]
        ground = checkerboard(height, width, 8, 0.25, 0.75)
        made = result["made"]
        rows = [composite(result["rgb"], result["alpha"], ground), composite(made[:, 1:], made[:, :1], ground)]
        rows += [part.expand(-1, 3, -1, -1) for part in (result["alpha"], made[:, :1])]
        save_grid(torch.cat(rows) * 2 - 1, len(made), path)


class DecoderTask(EncoderTask):
    """Trains the decoder on the same crops, with VAE and encoder frozen.

    Loss: reconstruction of [alpha, padded colours], as above; alpha counts twice, colours by 0.1 + 0.9 alpha. Half of
    the latents get Gaussian noise of a deviation drawn from 0..`noise`, because a denoiser's latents are not exact.
    """

    trained: tuple[str, ...] = ("decoder",)
    before: tuple[str, ...] = STAGES[:1]
    noisy = 0.5  # share of the latents that get noise

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """Crops, and the noise of their latents."""
        side = self.crop // PATCH
        channels = self.model.vae.config.latent_channels
        noise = torch.from_numpy(rng.standard_normal((size, channels, side, side), dtype=np.float32))
        deviation = self.noise * rng.random(size, dtype=np.float32) * (rng.random(size) < self.noisy)
        noise *= torch.from_numpy(deviation.astype(np.float32))[:, None, None, None]
        return {"images": self.crops(rng, size), "noise": noise}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The reconstruction of alpha and colours."""
        rgb, alpha, padded = batch["images"].split((3, 1, 3), 1)
        _, _, made = model(rgb, alpha, padded, batch["noise"])
        return self.reconstruction(made.float(), alpha, padded)

    def reconstruction(self, made: torch.Tensor, alpha: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
        """`image_loss` of what was read; alpha counts twice, colours by 0.1 + 0.9 alpha."""
        weight = torch.cat([2 * torch.ones_like(alpha), (0.1 + 0.9 * alpha).expand(-1, 3, -1, -1)], 1)
        return image_loss((made - torch.cat([alpha, padded], 1)) * weight)


class JointTask(DecoderTask):
    """Goes on with encoder and decoder together, so that latents come to hold what the decoder needs of alpha.

    Loss: reconstruction as above, and `PRICE` for each dB beyond `BUDGET` by which the frozen VAE's own
    reconstruction of the clean latents gets worse. Within the budget the encoder is free. Fewer latents get noise:
    what the encoder adds may be small where nothing drowns it.
    """

    trained = ("encoder", "decoder")
    before = STAGES[:2]
    noisy = 0.25
    BUDGET, PRICE = 0.35, 0.05

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The reconstruction, and what is beyond the budget of the VAE's own error."""
        rgb, alpha, padded = batch["images"].split((3, 1, 3), 1)
        decoded, _, made = model(rgb, alpha, padded, batch["noise"])
        loss = self.reconstruction(made.float(), alpha, padded)
        clean = batch["noise"].flatten(1).any(1).logical_not()
        if clean.any():
            loss = loss + self.PRICE * F.relu(self.lost(decoded[clean].float(), rgb[clean], alpha[clean]) - self.BUDGET)
        return loss

    def lost(self, decoded: torch.Tensor, rgb: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        """How many dB further from the image over grey `decoded` is than what the VAE makes of its own latents."""
        target = on_grey(rgb, alpha)
        with torch.no_grad():
            plain = self.model.vae.decode(self.model.vae.encode(target).latent_dist.mean).sample.float()
        errors = [((made - target) ** 2).flatten(1).mean(1) + QUIET for made in (decoded, plain)]
        return 10 * (errors[0] / errors[1]).log10().mean()


class RefineTask(DecoderTask):
    """Goes on with the decoder on latents as the adapted denoiser gives them, so that edges become sharp there too.

    Whole images. Half of them are from the concept list, with a margin, noised to a timestep up to `LATEST` and
    brought back by the denoiser in two steps with their caption; their alpha counts by `decisive`. The others are as in
    the stage before, so that what it learnt is kept.
    """

    before = STAGES[1:3]
    LATEST = 600

    def __init__(
        self, work: Path, vae: AutoencoderKL, denoiser: Denoiser, process: Process, start: Path | None = None
    ) -> None:
        super().__init__(work, vae, start, crop=data.load_images(work).shape[1])
        self.captioned = Captioned.load(work).listed()
        self.indices = load_tensors(require(work / "latents.safetensors", "latents"), "indices")["indices"].numpy()
        self._denoiser, self.process = [denoiser.eval().requires_grad_(False)], process

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """Crops as before, half of them replaced by whole images that are to be noised and denoised."""
        batch = super().draw(rng, size)
        listed = rng.choice(self.captioned.train, size)
        rgb, alpha = with_margin(*rgba_of(self.images, self.indices[listed]))
        known = torch.cat([rgb, alpha, padded_rgb(rgb, alpha)], 1)
        denoised = torch.from_numpy(rng.random(size) < 0.5)
        batch["images"] = torch.where(denoised[:, None, None, None], known, batch["images"])
        index, variant = torch.from_numpy(listed), torch.from_numpy(rng.integers(0, self.captioned.variants, size))
        return batch | {
            "denoised": denoised,
            "ids": self.captioned.condition(index, variant, torch.zeros(size, dtype=torch.bool)),
            "timesteps": torch.from_numpy(rng.integers(1, self.LATEST, size)),
            "gaussian": torch.from_numpy(rng.standard_normal(batch["noise"].shape, dtype=np.float32)),
        }

    def denoise(
        self, z: torch.Tensor, gaussian: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Latents noised to their timesteps and brought back in two steps of DDIM, the second from half of the way."""
        noise = gaussian
        for times in (timesteps, timesteps // 2):
            noisy, _ = self.process.noisy(z, noise, times)
            predicted = self._denoiser[0](noisy, self.process.model_timesteps(times), ids).float()
            z = self.process.clean(noisy, predicted, times)
            noise = self.process.noise_in(noisy, z, times)
        return z

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The reconstruction of the former, and `decisive` alpha with plain colours of the latter."""
        rgb, alpha, padded = batch["images"].split((3, 1, 3), 1)
        rows, noise = batch["denoised"], batch["noise"].clone()
        with torch.no_grad():
            mean, offset = self.model.encode(rgb, alpha, padded)
            if rows.any():
                z = (mean + offset).float()[rows]
                given = (part[rows] for part in (batch["gaussian"], batch["timesteps"], batch["ids"]))
                noise[rows] = self.denoise(z, *given) - z
        _, _, made = model(rgb, alpha, padded, noise)
        made, loss = made.float(), made.new_zeros(())
        if not rows.all():
            loss = self.reconstruction(made[~rows], alpha[~rows], padded[~rows])
        if rows.any():
            made, alpha, padded = made[rows], alpha[rows], padded[rows]
            loss = loss + decisive(made[:, :1] - alpha).mean()
            loss = loss + image_loss((made[:, 1:] - padded) * (0.1 + 0.9 * alpha))
        return loss


def decisive(error: torch.Tensor, knee: float = 0.3) -> torch.Tensor:
    """|error| (1 + knee) / (|error| + knee): 0 without an error, 1 for one of 1, and steep near 0.

    The mean of what a pixel may be is best by the square of the error, anything between 0 and 1 is equally good for an
    even chance by its size; by this one, 0 or 1 is. So an uncertain edge becomes a sharp one and not a haze.
    """
    size = error.abs()
    return size * (1 + knee) / (size + knee)


def _psnr(made: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """PSNR of each image in 0..1, (N,), at most 100 dB."""
    return psnr(made, target).clamp(max=100)
