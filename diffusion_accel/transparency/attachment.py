"""Latent transparency on one pipeline: what is in force while a call runs, and what becomes of its images."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffusion_accel.denoisers import entry_layer, find_denoiser
from diffusion_accel.diffusers_compat import offloads_models
from diffusion_accel.errors import AccelerationError, ConfigurationError, ModelLoadError, UnsupportedPipelineError
from diffusion_accel.feature import Attachment
from diffusion_accel.hooks import HookSet

from .adapter import Adapter, check_changes, read_changes
from .attention_sharing import Sharing, is_sharing
from .codec import decode_rgba, offset_of, refine_latents
from .conditions import Concatenated, Until, condition_latents, open_layer
from .fit import check_pipeline, read_by_vae
from .images import Given, given, overlaid, rgba_tensor, size_of, to_type
from .latent_transparency import CONDITIONS, LAYERS
from .modules import LatentTransparencyDecoder, LatentTransparencyEncoder
from .rgba import on_grey, resized, straight
from .weights import check_digests, find_parts, load_part, read_tensors

if TYPE_CHECKING:
    from diffusion_accel.steps import StepClock

    from .latent_transparency import LatentTransparency

logger = logging.getLogger(__name__)

NEAR = 0.02  # mean distance in -1..1 below which a tensor is a given image; half precision rounds by up to 0.004
ROUGHLY = 0.1  # the same where the image was resized in another way


@dataclass
class Loaded:
    """Everything that a setting needs: networks on the CPU, changes of the base model, sides to decode from, and steps
    that refine given latents."""

    encoder: LatentTransparencyEncoder | None
    decoder: LatentTransparencyDecoder | None
    adapter: Adapter | None
    sharing: Sharing | None
    views: int = 0
    refine: int = 0


def load(feature: LatentTransparency, pipeline: Any, headers: bool = False) -> Loaded:
    """Read and check the weights of `feature` for `pipeline`; with `headers` only names and shapes are read.

    Raises:
        ModelLoadError, ConfigurationError: they do not exist or do not fit; in one sentence.
    """
    factor = check_pipeline(pipeline)
    unet, channels = find_denoiser(pipeline), pipeline.vae.config.latent_channels
    parts = find_parts(pipeline, feature.weights, feature.variant, feature.adapter)
    if parts.decoder is not None and parts.decoder.is_dir() and not headers:
        check_digests(parts.decoder.parent)
    encoder: Any = None
    decoder: Any = None
    if feature.views != 0 and parts.decoder is not None:
        decoder = load_part(parts.decoder, LatentTransparencyDecoder, headers).to(memory_format=torch.channels_last)
    if parts.encoder is not None:
        scale = {} if parts.offset_scale is None else {"offset_scale": parts.offset_scale}
        encoder = load_part(parts.encoder, LatentTransparencyEncoder, headers, **scale)
    for part, path in ((encoder, parts.encoder), (decoder, parts.decoder)):
        if part is not None and (part.config.latent_channels, part.factor) != (channels, factor):
            raise ModelLoadError(
                f"{path} is for latents of {part.config.latent_channels} channels and 1/{part.factor} of the "
                f"images' sides, this VAE has {channels} and 1/{factor}"
            )
    adapter, sharing = None, None
    if feature.strength and parts.adapter is not None:
        tensors = read_tensors(parts.adapter, headers)
        if is_sharing(tensors):
            sharing = Sharing(parts.adapter, tensors, unet, len(LAYERS[feature.variant]))
        else:
            changes = read_changes(parts.adapter, tensors)
            inputs = channels * (1 + len(CONDITIONS[feature.variant]))
            check_changes(((name, change.shape) for name, change in changes.items()), unet, parts.adapter, inputs)
            adapter = Adapter(changes)
    views, refine = feature.views, feature.refine
    if views is None:
        views = 0 if decoder is None else decoder.config.recommended_views
    if refine is None:
        refine = 0 if encoder is None else encoder.config.recommended_refinement
    return Loaded(encoder, decoder, adapter, sharing, views, refine if decoder is not None else 0)


def supports(feature: LatentTransparency, pipeline: Any) -> str | None:
    """Why the pipeline cannot be made transparent, or None."""
    try:
        if not feature.idle:
            load(feature, pipeline, headers=True)
    except AccelerationError as error:
        return str(error)
    return None


def works_inside(feature: LatentTransparency, pipeline: Any) -> bool:
    """Whether the weights have something that changes the denoiser."""
    try:
        loaded = None if feature.idle else load(feature, pipeline, headers=True)
    except AccelerationError:  # `supports` says why
        return False
    return loaded is not None and (loaded.adapter is not None or loaded.sharing is not None)


def attach(feature: LatentTransparency, pipeline: Any) -> Attachment:
    """The feature on a pipeline."""
    return TransparencyAttachment(feature, pipeline)


class TransparencyAttachment(Attachment):
    """Between `before_call` and `after_call` the base model is adapted, and what the VAE decodes is kept."""

    def __init__(self, feature: LatentTransparency, pipeline: Any) -> None:
        super().__init__(feature, pipeline)
        self._loaded = Loaded(None, None, None, None) if feature.idle else load(feature, pipeline)
        self._decoded: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._given: list[tuple[Any, Given]] = []  # what the pipeline is called with, and what is known of it
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # pixels as it processed them, and straight RGBA
        self._overlays: list[tuple[Any, torch.Tensor, Any]] = []
        self._unread = False  # whether an image with alpha was given whose alpha nothing has read yet
        self._concatenated: Concatenated | None = None
        self._size = (0, 0)
        self._unet: Any = None
        self._read: Any = None
        self._counters: dict[str, float] = {}

    @property
    def _feature(self) -> LatentTransparency:
        return self.feature  # type: ignore[return-value]

    # ------------------------------------------------------------------ the call
    def process_input(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Images with alpha that the call is given: grey behind them, their alpha kept for the encoder.

        Raises:
            ConfigurationError: one can be seen through, and the weights have no encoder for it.
        """
        self._given, self._seen, self._overlays = [], [], []
        if self._feature.idle:
            return arguments
        self._check_vae()
        vae, changed = getattr(self.pipeline, "vae", None), dict(arguments)
        channels = getattr(vae, "config", {}).get("latent_channels")
        for name in read_by_vae(self.pipeline):
            found = given(arguments.get(name), channels)
            if found is None:
                continue
            if self._loaded.encoder is None and not found.opaque:
                raise ConfigurationError(
                    f"transparent: {name} has transparent parts, and these weights have no encoder for them; give an "
                    "opaque image, or weights with an encoder"
                )
            changed[name] = found.flat
            self._given += found.parts()
        self._unread = not all(found.opaque for _, found in self._given)
        self._size = self._image_size(arguments)
        return changed

    def _check_vae(self) -> None:
        """Refuse a VAE that these weights are not for: the user may have replaced it since accelerate()."""
        name = "transparent cannot be used on this pipeline any more"
        try:
            factor = check_pipeline(self.pipeline)
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}: {error}") from error
        channels = self.pipeline.vae.config.latent_channels
        for part in (self._loaded.encoder, self._loaded.decoder):
            if part is not None and (part.config.latent_channels, part.factor) != (channels, factor):
                raise ConfigurationError(
                    f"{name}: its weights are for latents of {part.config.latent_channels} channels and "
                    f"1/{part.factor} of the images' sides, the VAE that it has now has {channels} and 1/{factor}"
                )

    def _known(self, image: Any) -> Given | None:
        """What is known of an image, if it is one that the call was given."""
        if isinstance(image, (list, tuple)) and len(image) == 1 and not any(one is image for one, _ in self._given):
            image = image[0]
        return next((found for one, found in self._given if one is image), None)

    def _image_size(self, arguments: dict[str, Any]) -> tuple[int, int]:
        """Height and width of what the call draws, in pixels."""
        pipe = self.pipeline
        starts = self._given and "strength" in inspect.signature(type(pipe).__call__).parameters
        side = getattr(find_denoiser(pipe), "config", {}).get("sample_size") or 64
        scale = 1 if starts else getattr(pipe, "vae_scale_factor", 8)
        sides = self._given[0][1].rgba[0].shape[-2:] if starts else (side,) * 2 if isinstance(side, int) else side
        asked = (arguments.get("height"), arguments.get("width"))
        height, width = (int(one or known * scale) for one, known in zip(asked, sides, strict=True))
        return height // 8 * 8, width // 8 * 8

    def before_call(self, clock: StepClock) -> None:
        self._decoded, self._unet = [], find_denoiser(self.pipeline)
        vae, loaded, feature = getattr(self.pipeline, "vae", None), self._loaded, self._feature
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
            self._concatenated = Concatenated(condition_latents(vae, images, *self._size))
            hooks.add(entry_layer(self._unet), self._concatenated)
        if feature.until < 1:
            until = HookSet.within(self.changes, "diffusion_accel.transparency.until")
            until.add(self._unet, Until(clock, feature.until, self._unadapted))
        self._read = None if vae is None else vae.decode
        if loaded.decoder is not None:
            self._wrap(vae, "decode", self._decode)
        if self._given and loaded.encoder is not None:
            self._wrap(vae, "encode", self._encode)
        processor = getattr(self.pipeline, "image_processor", None)
        for name, around in (("preprocess", self._preprocess), ("apply_overlay", self._overlay)):
            if hasattr(processor, name):
                self._wrap(processor, name, around)

    def _unadapted(self) -> None:
        """From here on the base model is what it was."""
        if self._loaded.adapter is not None:
            self._loaded.adapter.restore()
        if self._loaded.sharing is not None:
            self._loaded.sharing.pause()
        if self._concatenated is not None:
            self._concatenated.paused = True

    def after_call(self) -> None:
        super().after_call()
        self._unet = self._read = self._concatenated = None
        self._given, self._seen = [], []

    def _wrap(self, owner: Any, name: str, around: Any) -> None:
        """Put `around(original, …)` in place of a method of one object, until the call ends."""
        original = getattr(owner, name)
        self.changes.set(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))

    def _decode(self, original: Any, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        made = original(z, *args, **kwargs)
        self._decoded.append((z.detach(), (made[0] if isinstance(made, tuple) else made.sample).detach()))
        return made

    def _decoded_by_vae(self, z: torch.Tensor) -> torch.Tensor:
        return self._read(z, return_dict=False)[0]

    def _preprocess(self, original: Any, image: Any, *args: Any, **kwargs: Any) -> Any:
        """The pipeline cuts and resizes a given image; its colours without the grey and its alpha go the same way."""
        pixels, found = original(image, *args, **kwargs), self._known(image)
        if found is not None and isinstance(pixels, torch.Tensor):
            self._seen.append((pixels, self._straight(*(original(x, *args, **kwargs) for x in found.layers()))))
        return pixels

    def _straight(self, colours: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        """Straight RGBA in 0..1 of colours multiplied by alpha, and alpha, as the pipeline processed them."""
        normalized = getattr(getattr(self.pipeline.image_processor, "config", None), "do_normalize", True)
        in_unit = [(x.float() / 2 + 0.5 if normalized else x.float()).clamp(0, 1) for x in (colours, alpha[:, :1])]
        return torch.cat([straight(*in_unit), in_unit[1]], 1)

    def _overlay(
        self, original: Any, mask: Any, init_image: Any, image: Any, crop_coords: Any = None, **kwargs: Any
    ) -> Any:
        """The pipeline puts what was drawn into the whole image; where that is, is kept for RGBA."""
        found = self._known(init_image)
        under = rgba_tensor(init_image)[0] if found is None else found.rgba[0]  # type: ignore[index]
        self._overlays.append((mask, under, crop_coords))
        return original(mask, init_image, image, crop_coords, **kwargs)

    def _rgba_of(self, x: torch.Tensor) -> torch.Tensor | None:
        """Straight RGBA (N, 4, H, W) of what the VAE is given, (N, 3, H, W) in -1..1.

        Each row belongs to the given image that it equals, but for parts that an inpainting mask has set to 0: there
        nothing is seen. None: it is none of the given images, but for example what guides a ControlNet.
        """
        known, near = self._seen, NEAR
        if not known:  # the pipeline has a way of its own to make tensors of images
            known, near = [_fitted(found, x) for _, found in self._given[:1]], ROUGHLY
        rows = [row for one in known if one[0].shape[-2:] == x.shape[-2:] for row in zip(*one, strict=True)]
        made = []
        for i, row in enumerate(x.float()):
            there = (row != 0).any(0, keepdim=True)
            distances = [float(((row - pixels.to(row)) * there).abs().sum()) for pixels, _ in rows]
            best = min(range(len(rows)), key=lambda j: (distances[j], j != i), default=None)
            if best is None or distances[best] > near * max(1, int(there.sum())) * len(row):
                return None
            rgba = rows[best][1].to(row)
            made.append(torch.cat([rgba[:3], rgba[3:] * there]))
        return torch.stack(made)

    def _encode(self, original: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The VAE's encoding of an image over grey, moved by the encoder's offset; nothing is drawn at random."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        made, rgba, loaded = original(x, *args, **kwargs), self._rgba_of(x), self._loaded
        assert loaded.encoder is not None
        if rgba is None:
            return made
        self._unread = False
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
        decoder, decoded, overlays = self._loaded.decoder, self._decoded, self._overlays
        self._decoded, self._overlays = [], []
        if self._unread:
            logger.warning("transparent: this call does not encode the image with its VAE; it is seen on grey")
        images = output[0] if isinstance(output, tuple) else getattr(output, "images", None)
        size = size_of(images)
        if decoder is None or images is None or (size is None and not decoded):
            return output  # latents, for example
        count = len(images)
        z, sample = _last(decoded, count)
        layers = LAYERS[self._feature.variant]
        rows = [i for i in range(count) if layers[i % len(layers)] == "fg"]  # the others are opaque
        if not rows:
            return output
        on_gpu = z.device.type != "cpu"
        decoder.to(z.device)
        dtype = torch.bfloat16 if on_gpu and z.dtype == torch.bfloat16 else torch.float32
        if decoder.dtype != dtype:
            decoder.to(dtype)
        rgb, alpha = decode_rgba(decoder, sample[rows], z[rows], self._loaded.views)
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
        for place, i in enumerate(rows):
            if i in _blocked(output):
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

    def counters(self) -> dict[str, float]:
        return dict(self._counters)


def _fitted(found: Given, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A given image at the size of `x`: pixels over grey in -1..1, and straight RGBA."""
    rgba = torch.cat([resized(one[None].float(), *x.shape[-2:]) for one in found.rgba])
    return on_grey(rgba[:, :3], rgba[:, 3:]), rgba


def _last(decoded: list[tuple[torch.Tensor, torch.Tensor]], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last `count` rows of what went into the VAE's decoder and of what came out.

    Raises:
        UnsupportedPipelineError: there are fewer.
    """
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for pair in reversed(decoded):
        if sum(len(z) for z, _ in parts) >= count:
            break
        parts.insert(0, pair)
    found = sum(len(z) for z, _ in parts)
    if found < count:
        raise UnsupportedPipelineError(
            f"transparent: the pipeline returned {count} images of {found} that its VAE decoded; it cannot be made "
            "transparent, use views=0 or switch the feature off"
        )
    z, sample = (torch.cat([pair[k] for pair in parts])[-count:] for k in (0, 1))
    return z, sample


def _blocked(output: Any) -> set[int]:
    """The images that a safety checker has blocked."""
    said = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    said = said if isinstance(output, tuple) else getattr(output, "nsfw_content_detected", None)
    if not isinstance(said, (list, tuple)) or not all(isinstance(one, (bool, np.bool_)) for one in said):
        return set()  # a caption, for example
    return {i for i, one in enumerate(said) if one}
