"""Latent transparency on one pipeline: what is in force while a call runs, and what becomes of its pictures."""

from __future__ import annotations

import inspect
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..denoisers import find_denoiser
from ..errors import ConfigurationError, ModelLoadError
from ..feature import Attachment
from .adapter import Adapter, check_changes, read_changes
from .codec import decode_rgba, offset_of, refine_latents
from .conditions import Concatenated, Until, condition_latents, open_picture
from .latent_transparency import CONDITIONS, LAYERS
from .modules import LatentTransparencyDecoder, LatentTransparencyEncoder
from .pictures import flattened, rgba_tensor, to_type
from .sharing import Sharing, is_sharing
from .weights import find_parts, load_part, read_tensors

if TYPE_CHECKING:
    from ..steps import StepClock
    from .latent_transparency import LatentTransparency


logger = logging.getLogger(__name__)


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
    vae, unet = getattr(pipeline, "vae", None), find_denoiser(pipeline)
    if vae is None or "latent_channels" not in getattr(vae, "config", {}):
        raise ConfigurationError("the pipeline has no VAE with latents")
    if unet is None:
        raise ConfigurationError("the pipeline has no unet or transformer")
    parts = find_parts(pipeline, feature.weights, feature.variant, feature.adapter)
    channels, factor = vae.config.latent_channels, 1 << (len(vae.config.block_out_channels) - 1)
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
                f"pictures' sides, this VAE has {channels} and 1/{factor}"
            )
    adapter, sharing = None, None
    if feature.strength and parts.adapter is not None:
        tensors = read_tensors(parts.adapter, headers)
        if is_sharing(tensors):
            sharing = Sharing(parts.adapter, tensors, unet, len(LAYERS[feature.variant]))
        else:
            changes = read_changes(parts.adapter, tensors)
            check_changes(((name, change.shape) for name, change in changes.items()), unet, parts.adapter)
            adapter = Adapter(changes)
    views, refine = feature.views, feature.refine
    if views is None:
        views = 0 if decoder is None else decoder.config.recommended_views
    if refine is None:
        refine = 0 if encoder is None else encoder.config.recommended_refinement
    return Loaded(encoder, decoder, adapter, sharing, views, refine if decoder is not None else 0)


class TransparencyAttachment(Attachment):
    """Between `before_call` and `after_call` the base model is adapted, and what the VAE decodes is kept."""

    def __init__(self, feature: LatentTransparency, pipeline: Any) -> None:
        super().__init__(feature, pipeline)
        self._loaded = Loaded(None, None, None, None) if feature.idle else load(feature, pipeline)
        self._decoded: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._given: tuple[torch.Tensor, torch.Tensor] | None = None
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
        """Pictures with alpha that the call starts from: grey behind them, their alpha kept for the encoder."""
        self._given, image = None, arguments.get("image")
        self._size = self._picture_size(arguments)
        if image is None or not self._starts_from_picture() or self._loaded.encoder is None:
            return arguments
        rgba = rgba_tensor(image)
        if rgba is None:
            return arguments
        self._given = (rgba[:, :3], rgba[:, 3:])
        return {**arguments, "image": flattened(image)}

    def _starts_from_picture(self) -> bool:
        """Whether `image` is what the call starts from (and not, for example, a ControlNet's)."""
        return "strength" in inspect.signature(type(self.pipeline).__call__).parameters

    def _picture_size(self, arguments: dict[str, Any]) -> tuple[int, int]:
        """Height and width of what the call draws, in pixels."""
        pipe, image = self.pipeline, rgba_tensor(arguments.get("image")) if self._starts_from_picture() else None
        side = getattr(find_denoiser(pipe), "config", {}).get("sample_size") or 64
        sides = image.shape[-2:] if image is not None else (side,) * 2 if isinstance(side, int) else tuple(side)
        scale = 1 if image is not None else getattr(pipe, "vae_scale_factor", 8)
        given = (arguments.get("height"), arguments.get("width"))
        height, width = (int(one or known * scale) for one, known in zip(given, sides, strict=True))
        return height // 8 * 8, width // 8 * 8

    def before_call(self, clock: StepClock) -> None:
        self._decoded, self._unet = [], find_denoiser(self.pipeline)
        vae, loaded, feature = getattr(self.pipeline, "vae", None), self._loaded, self._feature
        self._counters = {"views": float(loaded.views)}
        hooks = self.changes.hooks("diffusion_accel.transparency")
        if loaded.adapter is not None:
            self.changes.add(loaded.adapter.restore)
            loaded.adapter.apply(self._unet, feature.strength)
            self._counters["changed"] = float(len(loaded.adapter.changes))
        pictures = [open_picture(name, getattr(feature, name)) for name in CONDITIONS[feature.variant]]
        if loaded.sharing is not None:
            control = pictures[0] if loaded.sharing.needs_control else None
            loaded.sharing.install(self._unet, hooks, feature.strength, control)
        elif pictures and loaded.adapter is not None:
            self._concatenated = Concatenated(condition_latents(vae, pictures, *self._size))
            hooks.add(self._unet.conv_in, self._concatenated)
        if feature.until < 1:
            until = self.changes.hooks("diffusion_accel.transparency.until")
            until.add(self._unet, Until(clock, feature.until, self._unadapted))
        self._read = None if vae is None else vae.decode
        if loaded.decoder is not None:
            self._wrap(vae, "decode", self._decode)
        if self._given is not None:
            self._wrap(vae, "encode", self._encode)

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
        self._unet = self._read = self._concatenated = self._given = None

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

    def _encode(self, original: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The VAE's encoding of a picture over grey, moved by the encoder's offset; nothing is drawn at random."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        loaded = self._loaded
        assert self._given is not None and loaded.encoder is not None
        made = original(x, *args, **kwargs)
        known = made[0] if isinstance(made, tuple) else made.latent_dist
        rgb, alpha = (
            torch.nn.functional.interpolate(part, x.shape[-2:], mode="bilinear", antialias=True)
            .clamp(0, 1)
            .repeat(math.ceil(len(x) / len(part)), 1, 1, 1)[: len(x)]
            for part in self._given
        )
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
        """The same output with RGBA pictures in the place of RGB ones."""
        decoder, decoded = self._loaded.decoder, self._decoded
        self._decoded = []
        if decoder is None or not decoded:
            return output
        images = output[0] if isinstance(output, tuple) else getattr(output, "images", None)
        if images is None:
            return output
        count = len(images)
        z, sample = (torch.cat([pair[k] for pair in decoded])[-count:] for k in (0, 1))
        if len(z) != count:
            logger.warning("transparent: %d pictures of %d latents stay RGB", count, len(z))
            return output
        on_gpu = z.device.type != "cpu"
        decoder.to(z.device)
        dtype = torch.bfloat16 if on_gpu and z.dtype == torch.bfloat16 else torch.float32
        if decoder.dtype != dtype:
            decoder.to(dtype)
        layers = LAYERS[self._feature.variant]
        rows = [i for i in range(count) if layers[i % len(layers)] == "fg"]  # the others are opaque
        if not rows:
            return output
        rgb, alpha = decode_rgba(decoder, sample[rows], z[rows], self._loaded.views)
        if on_gpu and getattr(self.pipeline, "_all_hooks", None):
            decoder.to("cpu")  # the pipeline's models are offloaded, so is this one
        blocked = output[1] if isinstance(output, tuple) else getattr(output, "nsfw_content_detected", None)
        for place, i in enumerate(rows):
            if isinstance(blocked, (list, tuple)) and i < len(blocked) and blocked[i]:
                rgb[place], alpha[place] = 0, 0
        self._counters["decoded"] = float(len(rows))
        made = to_type(images, rows, torch.cat([rgb, alpha], 1))
        if isinstance(output, tuple):
            return (made, *output[1:])
        output.images = made
        return output

    def counters(self) -> dict[str, float]:
        return dict(self._counters)
