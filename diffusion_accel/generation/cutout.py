"""An image with alpha through a model's latents and back: what its transparency can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from diffusion_accel.errors import UnsupportedPipelineError
from diffusion_accel.measure.fidelity import psnr
from diffusion_accel.transparency.codec import decode_rgba, encode_rgba, refine_latents
from diffusion_accel.transparency.images import rgba_tensor, to_pil
from diffusion_accel.transparency.weights import load_weights

if TYPE_CHECKING:
    from PIL import Image

    from diffusion_accel.transparency.latent_transparency import LatentTransparency


def round_trip(pipe: Any, feature: LatentTransparency, image: Image.Image) -> tuple[Image.Image, float]:
    """An image encoded, decoded by the VAE, and read again.

    Args:
        pipe: a pipeline with a VAE.
        feature: which weights, views and steps of refining.
        image: with alpha; of any size.

    Returns:
        the image as it comes back, and how near its alpha is (PSNR in dB).

    Raises:
        UnsupportedPipelineError: the feature cannot work with this model, or its weights have no encoder.
    """
    reason = feature.supports(pipe)
    if reason:
        raise UnsupportedPipelineError(f"cutout cannot use this model: {reason}")
    loaded = load_weights(feature, pipe)
    if loaded.encoder is None or loaded.decoder is None:
        raise UnsupportedPipelineError("cutout needs an encoder, which these weights do not have")
    rgba = rgba_tensor(image)
    assert rgba is not None
    height, width = rgba.shape[-2:]
    factor = loaded.encoder.factor
    around = (0, -width % factor, 0, -height % factor)
    whole = F.pad(rgba, around, mode="replicate") if any(around) else rgba
    with torch.no_grad():
        known = whole[:, :3], whole[:, 3:]
        z = encode_rgba(pipe.vae, loaded.encoder, *known)
        z = refine_latents(lambda z: pipe.vae.decode(z).sample, loaded.decoder, z, *known, loaded.refine)
        rgb, alpha = decode_rgba(loaded.decoder, pipe.vae.decode(z).sample, z, loaded.views)
    made = torch.cat([rgb, alpha], 1)[..., :height, :width]
    return to_pil(made)[0], float(psnr(rgba[:, 3:], made[:, 3:].cpu())[0])
