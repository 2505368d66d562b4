"""The feature on pipelines: RGBA out and in, every kind of output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transparency_weights import WEIGHTS, draw, tiny_decoder, tiny_encoder, write_weights
from zoo import DIM, TOKENS, controlnet, ip_adapter, rand, sd, sdxl
from zoo import img2img as img2img_zoo

from diffusion_accel import ConfigurationError, LatentTransparency, accelerate
from diffusion_accel.transparency.codec import decode_rgba, encode_rgba
from diffusion_accel.transparency.images import rgba_tensor


def expected(pipe: Any, latents: torch.Tensor, views: int = 8) -> torch.Tensor:
    """RGBA by hand from the latents of an adapted pipeline."""
    z = latents / pipe.vae.config.scaling_factor
    with torch.no_grad():
        rgb, alpha = decode_rgba(tiny_decoder(), pipe.vae.decode(z).sample, z, views)
    return torch.cat([rgb, alpha], 1)


@pytest.mark.parametrize("views", [8, 4, 1])
def test_images_are_rgba_in_every_kind_of_output(views: int) -> None:
    pipe, call = sd()
    accelerate(pipe, LatentTransparency(weights=WEIGHTS, views=views))
    call = {**call, "num_images_per_prompt": 2}
    latents = draw(pipe, call, "latent").images
    assert latents.shape[1] == 4 and "decoded" not in pipe.acceleration.report().counters["transparent"]
    wanted = expected(pipe, latents, views)
    tensor = draw(pipe, call, "pt").images
    assert torch.allclose(tensor, wanted, atol=1e-5)
    assert np.allclose(draw(pipe, call, "np").images, wanted.permute(0, 2, 3, 1).numpy(), atol=1e-5)
    images = draw(pipe, call).images
    assert [image.mode for image in images] == ["RGBA", "RGBA"]
    assert torch.allclose(rgba_tensor(images), wanted, atol=0.51 / 255)
    assert torch.equal(rgba_tensor(draw(pipe, call, return_dict=False)[0]), rgba_tensor(images))
    counters = pipe.acceleration.report().counters["transparent"]
    assert counters["decoded"] == 2 and counters["views"] == views and counters["changed"] == 4
    pipe.acceleration.disable()
    assert draw(pipe, call).images[0].mode == "RGB"


def test_without_views_only_the_base_is_adapted_and_without_strength_it_is_not() -> None:
    pipe, call = sd()
    base = draw(pipe, call, "pt").images
    for feature, same in (({"views": 0}, False), ({"strength": 0.0}, True)):
        accelerate(pipe, LatentTransparency(weights=WEIGHTS, **feature))
        made = draw(pipe, call, "latent").images
        pipe.acceleration.remove()
        assert torch.equal(made, draw(pipe, call, "latent").images) is same
    accelerate(pipe, LatentTransparency(weights=WEIGHTS, views=0))
    assert draw(pipe, call, "pt").images.shape == base.shape


def test_the_adapter_may_end_before_the_steps_do() -> None:
    pipe, call = sd()
    base = draw(pipe, call, "latent", 4).images
    results = []
    for until in (0.01, 0.5, 1.0):
        accelerate(pipe, LatentTransparency(weights=WEIGHTS, until=until))
        results.append(draw(pipe, call, "latent", 4).images)
    distances = [float((result - base).norm()) for result in results]
    assert 0 < distances[0] < distances[1] < distances[2]
    pipe.acceleration.remove()
    assert torch.equal(draw(pipe, call, "latent", 4).images, base)


def test_an_rgba_image_goes_in_and_comes_out() -> None:
    pipe, call = img2img_zoo()
    values = (rand(16, 16, 4).sigmoid() * 255).to(torch.uint8).numpy()
    image = Image.fromarray(values)
    accelerate(pipe, LatentTransparency(weights=WEIGHTS, strength=0.0))
    seen: list[torch.Tensor] = []
    add_noise = type(pipe.scheduler).add_noise

    def watched(self: Any, latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(latents)
        return add_noise(self, latents, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.scheduler), "add_noise", watched)
        made = draw(pipe, {**call, "image": image}).images[0]
        grey = draw(pipe, {**call, "image": image.convert("RGB")}).images[0]
    assert made.mode == "RGBA" and grey.mode == "RGBA"
    rgba = rgba_tensor(image)
    z = encode_rgba(pipe.vae, tiny_encoder(), rgba[:, :3], rgba[:, 3:]) * pipe.vae.config.scaling_factor
    assert (seen[0] - z).norm() < 0.1 * (seen[0] - seen[1]).norm(), "equal but for rounding to 8 bits"
    assert "encode" not in pipe.vae.__dict__ and "decode" not in pipe.vae.__dict__
    pipe.acceleration.remove()
    accelerate(pipe, LatentTransparency(weights=WEIGHTS, strength=0.0, refine=2))
    refined = draw(pipe, {**call, "image": image}).images[0]
    assert refined.mode == "RGBA" and not np.array_equal(np.asarray(refined), np.asarray(made))
    assert np.array_equal(np.asarray(refined), np.asarray(draw(pipe, {**call, "image": image}).images[0]))
    batch = draw(pipe, {**call, "image": [image, image.rotate(90)], **prompts(2)}).images
    assert [one.mode for one in batch] == ["RGBA"] * 2


def prompts(batch: int) -> dict[str, Any]:
    return {f"{k}prompt_embeds": rand(batch, TOKENS, DIM, seed=s) for k, s in (("", 1), ("negative_", 2))}


@pytest.mark.parametrize("build", [controlnet, ip_adapter, sdxl])
def test_other_inputs_and_families(build: Any, tmp_path: Path) -> None:
    pipe, call = build()
    accelerate(pipe, LatentTransparency(weights=write_weights(tmp_path, pipe.unet)))
    image = draw(pipe, call).images[0]
    assert image.mode == "RGBA"
    pipe.acceleration.remove()
    assert draw(pipe, call).images[0].mode == "RGB"


def test_blocked_images_stay_blocked() -> None:
    pipe, call = sd()
    accelerate(pipe, LatentTransparency(weights=WEIGHTS))

    def checker(images: Any, **kwargs: Any) -> Any:
        return images, [True, False]

    pipe.run_safety_checker = lambda image, device, dtype: checker(image)
    images = draw(pipe, {**call, "num_images_per_prompt": 2}).images
    assert not np.asarray(images[0]).any() and np.asarray(images[1]).any()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"views": 3}, "views must be 8, 4, 1 or 0, got 3"),
        ({"refine": -1}, "refine must be between 0 and 9999, got -1"),
        ({"strength": -1.0}, "strength must be between 0 and 100, got -1.0"),
        ({"until": 0.0}, "until must be above 0"),
        ({"variant": "nothing"}, "variant must be one of fg, "),
        ({"variant": "fg2blend"}, "needs an image foreground=FILE"),
        ({"background": "x.png"}, "the variant fg takes no image background"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        LatentTransparency(**values)
