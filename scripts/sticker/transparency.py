"""Training latent transparency for the sticker model: encoder and decoder, then a low-rank update of the UNet."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from diffusion_accel.measure.fidelity import psnr
from diffusion_accel.training.denoising import Process
from diffusion_accel.training.diffusion_task import Denoiser, DenoisingTask, Objective, sample_of
from diffusion_accel.training.files import UsageError, load_tensors, replacing_folder, require
from diffusion_accel.training.images import image_loss, save_grid
from diffusion_accel.training.loop import Batch
from diffusion_accel.training.state import STATE, load_average
from diffusion_accel.transparency.files import ADAPTER
from diffusion_accel.transparency.modules import LatentTransparencyDecoder, LatentTransparencyEncoder
from diffusion_accel.transparency.rgba import checkerboard, composite, on_grey, padded_rgb, straight
from diffusion_accel.transparency.weights import load_part, read_weights, write_digests

from . import data
from .latents import PATCH
from .low_rank import add_low_rank, low_rank_changes, set_low_rank
from .tasks import Captioned

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

ENCODER: dict[str, Any] = {
    "block_out_channels": (16, 32, 64, 128),
    "offset_scale": 15.0,
    "recommended_refinement": 16,
}
DECODER: dict[str, Any] = {
    "block_out_channels": (16, 16, 32, 64, 96),
    "attention_levels": 2,
    "layers_per_block": 1,
    "recommended_views": 1,
}

STAGES = ("encoder", "decoder", "joint", "refine")  # that train the pair; each begins with what the one before left
COMPONENTS = 6  # of the 8x8 patches of alpha, in the code that the encoder begins with
SHARPEN = 0.22  # alpha below this is clear, alpha above 1 - this is opaque, in what is exported
QUIET = 4e-4  # mean square error in -1..1 (40 dB) below which a change of the VAE's reconstruction hardly counts
MARGIN = 6  # pixels between the border and what the adapted UNet learns to draw
AMPLITUDE = 0.17  # of the code, in latents, which have unit RMS


class Pair(nn.Module):
    """Encoder and decoder, with the frozen VAE between them (whose weights are not part of the state)."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        channels = {"latent_channels": vae.config.latent_channels}
        self.encoder = LatentTransparencyEncoder(**ENCODER, **channels)
        self.decoder = LatentTransparencyDecoder(**DECODER, **channels).to(memory_format=torch.channels_last)
        self._vae = [vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)]

    @property
    def vae(self) -> AutoencoderKL:
        return self._vae[0]

    def encode(self, rgb: torch.Tensor, alpha: torch.Tensor, padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The VAE's latents of the image over grey, and what the encoder adds to them."""
        with torch.no_grad():
            known = self.vae.encode(on_grey(rgb, alpha)).latent_dist
        return known.mean, known.std * self.encoder(torch.cat([alpha, padded], 1))

    def forward(
        self, rgb: torch.Tensor, alpha: torch.Tensor, padded: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """-> (the VAE's RGB in -1..1, what the encoder adds, and, given latent noise, [alpha, colours] as read)."""
        mean, offset = self.encode(rgb, alpha, padded)
        z = mean + offset if noise is None else mean + offset + noise
        with torch.set_grad_enabled(torch.is_grad_enabled() and offset.requires_grad):
            decoded = self.vae.decode(z.contiguous(memory_format=torch.channels_last)).sample
        made = None if noise is None else self.decoder((decoded / 2 + 0.5).clamp(0, 1), z)
        return decoded, offset, made


def load_pair(work: Path, pair: Pair, stages: tuple[str, ...], start: Path | None = None) -> None:
    """Load what the last of `stages` that has run has left, else the weights in the folder `start`.

    Raises:
        UsageError: none has run and there is no `start`, or its networks have other sizes.
    """
    done = [stage for stage in stages if (work / "transparency" / stage / STATE).is_file()]
    if done or start is None:
        stage = (done or list(stages[:1]))[-1]
        load_average(work / "transparency" / stage, pair, stage)
        return
    for name, part in pair.named_children():
        try:
            part.load_state_dict(load_part(start / name, type(part)).state_dict())
        except RuntimeError as error:
            raise UsageError(f"the {name} in {start} has other sizes than the one that is trained here") from error
    soften(pair.decoder)


def rgba_of(images: np.ndarray, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Straight colours and alpha, in 0..1, of some of the cached images."""
    pixels = torch.from_numpy(images[indices]).permute(0, 3, 1, 2).float() / 255
    alpha = pixels[:, 3:].contiguous()
    return straight(pixels[:, :3], alpha), alpha


def with_margin(rgb: torch.Tensor, alpha: torch.Tensor, margin: int = MARGIN) -> tuple[torch.Tensor, torch.Tensor]:
    """Straight colours and alpha, those images `margin` pixels smaller on each side that come nearer to the border.

    An image that is cut off by its border cannot be put on another one.
    """
    near = F.pad(alpha[..., margin:-margin, margin:-margin], (margin,) * 4).ne(alpha).flatten(1).any(1)
    side = [length - 2 * margin for length in alpha.shape[-2:]]
    small = F.interpolate(torch.cat([rgb * alpha, alpha], 1), side, mode="bicubic", antialias=True).clamp(0, 1)
    small = F.pad(small, (margin,) * 4)
    smaller = straight(small[:, :3], small[:, 3:]), small[:, 3:]
    chosen = near[:, None, None, None]
    return torch.where(chosen, smaller[0], rgb), torch.where(chosen, smaller[1], alpha)


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
        return {"images": self.crops(rng, size)}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
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
        side = self.crop // PATCH
        channels = self.model.vae.config.latent_channels
        noise = torch.from_numpy(rng.standard_normal((size, channels, side, side), dtype=np.float32))
        deviation = self.noise * rng.random(size, dtype=np.float32) * (rng.random(size) < self.noisy)
        noise *= torch.from_numpy(deviation.astype(np.float32))[:, None, None, None]
        return {"images": self.crops(rng, size), "noise": noise}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        rgb, alpha, padded = batch["images"].split((3, 1, 3), 1)
        _, _, made = model(rgb, alpha, padded, batch["noise"])
        return self.reconstruction(made.float(), alpha, padded)

    def reconstruction(self, made: torch.Tensor, alpha: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
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


@torch.no_grad()
def alpha_code(vae: AutoencoderKL, images: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear code of alpha in latents that the VAE's decoder hardly notices: kernel (C, 1, 8, 8) and bias (C,).

    The first principal components of the 8x8 patches of alpha lie along the directions of the latents to which the
    decoder is least sensitive, the largest along the least; a component of deviation d has the deviation
    `AMPLITUDE` sqrt(d) in the latents.
    """
    z = vae.encode(images).latent_dist.mean
    moves = torch.eye(z.shape[1]).to(z)[:, None, :, None, None] * 0.2
    slopes = torch.stack([(vae.decode(z + move).sample - vae.decode(z - move).sample).flatten() for move in moves])
    directions = torch.linalg.eigh(slopes @ slopes.T).eigenvectors[:, :COMPONENTS]
    patches = F.unfold(alpha, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, PATCH * PATCH)
    mean = patches.mean(0)
    variances, components = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    components, deviations = components.flip(1)[:, :COMPONENTS], variances.flip(0)[:COMPONENTS].sqrt()
    kernel = directions @ (AMPLITUDE * deviations**-0.5 * components).T
    return kernel.view(-1, 1, PATCH, PATCH), -kernel @ mean


def _psnr(made: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """PSNR of each image in 0..1, (N,), at most 100 dB."""
    return psnr(made, target).clamp(max=100)


# ------------------------------------------------------------------------------------------- the base model
@torch.no_grad()
def adjusted_latents(work: Path, vae: AutoencoderKL, start: Path | None = None, batch: int = 64) -> torch.Tensor:
    """The latents of the chosen images as the trained encoder changes them, in the order of `latents.safetensors`.

    The images have a margin, so that the denoiser learns to keep it.
    """
    stored = load_tensors(require(work / "latents.safetensors", "latents"), "indices", "listed")
    images, listed = data.load_images(work), int(stored["listed"])
    pair = Pair(vae)
    load_pair(work, pair, STAGES[:3], start)
    made = []
    for part in stored["indices"][:listed].split(batch):
        rgb, alpha = with_margin(*rgba_of(images, part.numpy()))
        mean, offset = pair.encode(rgb, alpha, padded_rgb(rgb, alpha))
        made.append(mean + offset)
    return torch.cat(made)


def trained_denoiser(work: Path, pipeline: Any, rank: int) -> Denoiser:
    """Text encoder and UNet with the trained update."""
    denoiser = Denoiser(copy.deepcopy(pipeline.unet).float(), pipeline.text_encoder.float())
    add_low_rank(denoiser.core, rank)
    load_average(work / "transparency" / "unet", denoiser, "unet")
    return denoiser


def unet_task(work: Path, pipeline: Any, rank: int, objective: Objective, start: Path | None = None) -> DenoisingTask:
    """Trains the low-rank update on the concept list with changed latents; text encoder and base weights stay.

    It begins at zero, or with the adapter in the folder `start`.
    """
    latents = load_tensors(require(work / "transparency" / "latents.safetensors", "latents"), "latents")["latents"]
    captioned = replace(Captioned.load(work).listed(), latents=latents)
    torch.manual_seed(0)
    denoiser = Denoiser(pipeline.unet.float(), pipeline.text_encoder.float().requires_grad_(False))
    add_low_rank(denoiser.core, rank)
    if start is not None:
        set_low_rank(denoiser.core, read_weights(start / ADAPTER))
    return DenoisingTask(denoiser, captioned, objective)


# ------------------------------------------------------------------------------------------- export
@torch.no_grad()
def sharpen(decoder: LatentTransparencyDecoder) -> None:
    """Fold (alpha - low) / (high - low) into the last layer: an edge that is uncertain becomes narrower."""
    decoder.conv_out.weight[0] /= 1 - 2 * SHARPEN
    decoder.conv_out.bias[0] = (decoder.conv_out.bias[0] - SHARPEN) / (1 - 2 * SHARPEN)


@torch.no_grad()
def soften(decoder: LatentTransparencyDecoder) -> None:
    """Undo `sharpen`: what was exported is trained on, and exported again."""
    decoder.conv_out.weight[0] *= 1 - 2 * SHARPEN
    decoder.conv_out.bias[0] = decoder.conv_out.bias[0] * (1 - 2 * SHARPEN) + SHARPEN


class FinishedTask(DecoderTask):
    """What the stages have left, to look at."""

    before = STAGES


def export_transparency(
    work: Path, pipeline: Any, out: Path, rank: int, overwrite: bool = False, start: Path | None = None
) -> dict[str, Any]:
    """Write encoder, decoder and, if the UNet was trained, its update as float16; returns sizes and final numbers."""
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists; choose another folder or pass --overwrite")
    task = FinishedTask(work, pipeline.vae, start)
    sharpen(task.model.decoder)
    pair = task.model.half().float().eval()
    with torch.no_grad():
        facts = task.evaluate()
    with replacing_folder(out) as temporary:
        pair.encoder.half().save_pretrained(temporary / "encoder")
        pair.decoder.half().to(memory_format=torch.contiguous_format).save_pretrained(temporary / "decoder")
        if (work / "transparency" / "unet").exists():
            trained = trained_denoiser(work, pipeline, rank)
            save_file(low_rank_changes(trained.core, pipeline.unet), temporary / ADAPTER)
        write_digests(temporary)
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)
    return facts | {"bytes": sum(file.stat().st_size for file in out.rglob("*.safetensors"))}
