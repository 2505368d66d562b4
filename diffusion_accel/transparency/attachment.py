"""Latent transparency on one pipeline: what is in force while a call runs, and what becomes of its images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from diffusion_accel.denoisers import entry_layer, find_denoiser
from diffusion_accel.diffusers_compat import offloads_models, origin_of
from diffusion_accel.errors import AccelerationError, ConfigurationError
from diffusion_accel.feature import Attachment
from diffusion_accel.hooks import HookSet
from diffusion_accel.io import at_home
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.report import several

from .codec import decode_rgba, offset_of, refine_latents
from .conditions import Concatenated, StopAdapterHook, condition_latents, open_layer
from .files import local_folder
from .fit import check_pipeline
from .given_images import GivenImages
from .images import overlaid, size_of, to_pil, to_type
from .latent_transparency import CONDITIONS, IMAGES, LAYERS, LatentTransparency
from .modules import LatentTransparencyDecoder
from .outputs import blocked, last_decoded
from .rgba import resized
from .weights import TransparencyWeights, load_weights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusion_accel.steps import StepClock

logger = logging.getLogger(__name__)


def supports(feature: LatentTransparency, pipeline: DiffusionPipeline) -> str | None:
    """Why the pipeline cannot be made transparent, or None."""
    try:
        if not feature.idle:
            load_weights(feature, pipeline, headers=True)
    except AccelerationError as error:
        return str(error)
    return None


def works_inside(feature: LatentTransparency, pipeline: DiffusionPipeline) -> bool:
    """Whether the weights have something that changes the denoiser."""
    try:
        loaded = None if feature.idle else load_weights(feature, pipeline, headers=True)
    except AccelerationError:  # `supports` says why
        return False
    return loaded is not None and (loaded.adapter is not None or loaded.sharing is not None)


def goes_into_graphs(feature: LatentTransparency, pipeline: DiffusionPipeline) -> bool:
    """Whether what changes the denoiser are its weights alone, at all steps."""
    if feature.until < 1 or CONDITIONS[feature.variant]:
        return False
    return load_weights(feature, pipeline, headers=True).sharing is None


def rows_apart(feature: LatentTransparency, pipeline: DiffusionPipeline) -> bool:
    """Whether what changes the denoiser are its weights alone, at all steps."""
    return goes_into_graphs(feature, pipeline)


def attach(feature: LatentTransparency, pipeline: DiffusionPipeline) -> TransparencyAttachment:
    """The feature on a pipeline."""
    return TransparencyAttachment(feature, pipeline)


def portable(feature: LatentTransparency, pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Weights and images as a recipe is to have them: what lies beside an embedded model by its name."""
    given = {name: at_home(value) for name in ("adapter", *IMAGES) if (value := getattr(feature, name))}
    if feature.idle:
        return given
    origin = origin_of(pipeline)
    if not feature.weights and (name := next((n for n, m in EMBEDDED.items() if str(m.path) == origin), None)):
        return {**given, "weights": name}
    folder = local_folder(pipeline, feature.weights)
    return given if folder is None or feature.weights in EMBEDDED else {**given, "weights": folder}


class TransparencyAttachment(Attachment[LatentTransparency]):
    """Between `before_call` and `after_call` the base model is adapted, and what the VAE decodes is kept."""

    def __init__(self, feature: LatentTransparency, pipeline: DiffusionPipeline) -> None:
        super().__init__(feature, pipeline)
        self._weights = TransparencyWeights(None, None, None, None) if feature.idle else load_weights(feature, pipeline)
        self._decoded: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._images = GivenImages()
        self._concatenated: Concatenated | None = None
        self._unet: Any = None
        self._read: Any = None
        self._counters: dict[str, float] = {}

    def shared(self, pipeline: DiffusionPipeline) -> TransparencyAttachment:
        """The same for another pipeline, whose calls are computed with a base model that is adapted already."""
        other = super().shared(pipeline)
        other._weights = replace(self._weights, adapter=None)
        return other

    def models(self) -> list[torch.nn.Module]:
        """The encoder and the decoder that stand beside the VAE."""
        return [part for part in (self._weights.encoder, self._weights.decoder) if part is not None]

    # ------------------------------------------------------------------ the call
    def process_input(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Images with alpha that the call is given: grey behind them, their alpha kept for the encoder.

        Raises:
            ConfigurationError: one can be seen through, and the weights have no encoder for it.
        """
        self._images = GivenImages()
        if self.feature.idle:
            return arguments
        self._check_vae()
        return self._images.take(arguments, self.pipeline, readable=self._weights.encoder is not None)

    def _check_vae(self) -> None:
        """Refuse a VAE that these weights are not for: the user may have replaced it since accelerate()."""
        name = "transparent cannot be used on this pipeline any more"
        try:
            factor = check_pipeline(self.pipeline)
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}: {error}") from error
        channels = self.pipeline.vae.config.latent_channels
        for part in (self._weights.encoder, self._weights.decoder):
            if part is not None and (part.config.latent_channels, part.factor) != (channels, factor):
                raise ConfigurationError(
                    f"{name}: its weights are for latents of {part.config.latent_channels} channels and "
                    f"1/{part.factor} of the images' sides, the VAE that it has now has {channels} and 1/{factor}"
                )

    def before_call(self, clock: StepClock) -> None:
        """Adapt the base model, and put the encoder and the decoder beside the VAE."""
        self._decoded, self._unet = [], find_denoiser(self.pipeline)
        vae, loaded, feature = getattr(self.pipeline, "vae", None), self._weights, self.feature
        self._counters = {"views": float(loaded.views)}
        hooks = HookSet.within(self.changes, "diffusion_accel.transparency")
        if loaded.adapter is not None:
            self.changes.add(loaded.adapter.restore)
            loaded.adapter.apply(self._unet, feature.strength)
            self._counters["changed"] = float(len(loaded.adapter.changes))
        images = [open_layer(name, getattr(feature, name)) for name in CONDITIONS[feature.variant]]
        if loaded.sharing is not None:
            control = images[0] if loaded.sharing.needs_control else None
            loaded.sharing.install(self._unet, hooks, feature.strength, control)
        elif images and loaded.adapter is not None:
            self._concatenated = Concatenated(condition_latents(vae, images, *self._images.size))
            hooks.add(entry_layer(self._unet), self._concatenated)
        if feature.until < 1:
            until = HookSet.within(self.changes, "diffusion_accel.transparency.until")
            until.add(self._unet, StopAdapterHook(clock, feature.until, self._unadapted))
        self._read = None if vae is None else vae.decode
        if loaded.decoder is not None:
            self._wrap(vae, "decode", self._decode)
        if self._images.given and loaded.encoder is not None:
            self._wrap(vae, "encode", self._encode)
        processor = getattr(self.pipeline, "image_processor", None)
        follow = partial(self._images.preprocess, processor)
        for name, around in (("preprocess", follow), ("apply_overlay", self._images.overlay)):
            if hasattr(processor, name):
                self._wrap(processor, name, around)

    def _unadapted(self) -> None:
        """From here on the base model is what it was."""
        if self._weights.adapter is not None:
            self._weights.adapter.restore()
        if self._weights.sharing is not None:
            self._weights.sharing.pause()
        if self._concatenated is not None:
            self._concatenated.paused = True

    def after_call(self) -> None:
        """Give the base model back; what was decoded stays until the output is made of it."""
        super().after_call()
        self._unet = self._read = self._concatenated = None
        self._images.forget()

    def _wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Put `around(original, …)` in place of a method of one object, until the call ends."""
        original = getattr(owner, name)
        self.changes.set(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))

    def _decode(self, original: Callable[..., Any], z: torch.Tensor, *args: object, **kwargs: object) -> Any:
        made = original(z, *args, **kwargs)
        self._decoded.append((z.detach(), (made[0] if isinstance(made, tuple) else made.sample).detach()))
        return made

    def _decoded_by_vae(self, z: torch.Tensor) -> torch.Tensor:
        return self._read(z, return_dict=False)[0]

    def _encode(self, original: Callable[..., Any], x: torch.Tensor, *args: object, **kwargs: object) -> Any:
        """The VAE's encoding of an image over grey, moved by the encoder's offset; nothing is drawn at random."""
        made, rgba, loaded = original(x, *args, **kwargs), self._images.rgba_of(x), self._weights
        assert loaded.encoder is not None
        if rgba is None:
            return made
        self._images.unread = False
        known = made[0] if isinstance(made, tuple) else made.latent_dist
        rgb, alpha = rgba[:, :3], rgba[:, 3:]
        moved = known.mean + known.std * offset_of(loaded.encoder.to(x.device), rgb, alpha).to(known.mean)
        if loaded.refine and loaded.decoder is not None:
            decoder = loaded.decoder.to(x.device)
            moved = refine_latents(self._decoded_by_vae, decoder, moved, rgb, alpha, loaded.refine)
        certain = DiagonalGaussianDistribution(torch.cat([moved, torch.full_like(moved, -30)], 1), deterministic=True)
        if isinstance(made, tuple):
            return (certain, *made[1:])
        return type(made)(latent_dist=certain)

    # ------------------------------------------------------------------ what comes out
    @torch.no_grad()
    def process_output(self, output: Any) -> Any:
        """The same output with RGBA images in the place of RGB ones."""
        decoder, decoded, overlays = self._weights.decoder, self._decoded, self._images.overlays
        self._decoded, self._images.overlays = [], []
        if self._images.unread:
            logger.warning("transparent: this call does not encode the image with its VAE; it is seen on grey")
        images = output[0] if isinstance(output, tuple) else getattr(output, "images", None)
        size = size_of(images)
        if decoder is None or images is None or (size is None and not decoded):
            return output  # latents, for example
        count = len(images)
        z, sample = last_decoded(decoded, count)
        layers = LAYERS[self.feature.variant]
        rows = [i for i in range(count) if layers[i % len(layers)] == "fg"]  # the others are opaque
        if not rows:
            return output
        rgb, alpha = self._read_rgba(decoder, sample[rows], z[rows])
        for place, i in enumerate(rows):
            if i in blocked(output):
                rgb[place], alpha[place] = 0, 0
        self._counters["decoded"] = float(len(rows))
        made = []
        for i, one in zip(rows, torch.cat([rgb, alpha], 1), strict=True):
            if len(overlays) == count:
                made.append(overlaid(one, *overlays[i]))
            else:  # some pipelines draw at another size than they return
                made.append(one if size is None else resized(one[None], *size)[0])
        changed = to_type(images, rows, made)
        if isinstance(output, tuple):
            return (changed, *output[1:])
        output.images = changed
        return output

    @torch.no_grad()
    def preview(self, images: list[Any], z: torch.Tensor, decoded: torch.Tensor) -> list[Any]:
        """Images with the alpha that their latents have by now."""
        decoder, layers = self._weights.decoder, LAYERS[self.feature.variant]
        rows = [i for i in range(len(images)) if layers[i % len(layers)] == "fg"]
        if decoder is None or not rows:
            return images
        rgba = to_pil(torch.cat(self._read_rgba(decoder, decoded[rows], z[rows]), 1).cpu())
        made = dict(zip(rows, rgba, strict=True))
        return [made.get(i, image) for i, image in enumerate(images)]

    def _read_rgba(
        self, decoder: LatentTransparencyDecoder, sample: torch.Tensor, z: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Straight colours, with the pipeline's watermark, and alpha of some images and their latents."""
        on_gpu = z.device.type != "cpu"
        decoder.to(z.device)
        dtype = torch.bfloat16 if on_gpu and z.dtype == torch.bfloat16 else torch.float32
        if decoder.dtype != dtype:
            decoder.to(dtype)
        rgb, alpha = decode_rgba(decoder, sample, z, self._weights.views)
        if on_gpu and offloads_models(self.pipeline):
            decoder.to("cpu")  # the pipeline's models are offloaded, so is this one
        if not (rgb.isfinite().all() and alpha.isfinite().all()):
            raise AccelerationError(
                "transparent: what was decoded holds values that are no numbers (NaN or infinite); check the weights, "
                "and try float32"
            )
        watermark = getattr(self.pipeline, "watermark", None)
        if watermark is not None:
            rgb = watermark.apply_watermark(rgb * 2 - 1).to(rgb) / 2 + 0.5
        return rgb, alpha

    def counters(self) -> dict[str, float]:
        """Sides that the decoder looks from, images that it decoded, parameters of the base model that were changed."""
        return dict(self._counters)

    def words(self) -> str:
        """The counters for people."""
        count = {"views": 0.0, "changed": 0.0, "decoded": 0.0} | self._counters
        said = f"{several(count['decoded'], 'image')} decoded from {several(count['views'], 'side')}"
        changed = several(count["changed"], "weight tensor")
        return f"{said}, {changed} of the model changed during the call" if count["changed"] else said
