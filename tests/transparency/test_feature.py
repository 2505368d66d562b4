"""The feature on pipelines: RGBA out and in, every kind of output, weights found and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transparency_weights import sharing_tensors, tiny_changes, tiny_decoder, tiny_encoder, tiny_weights, write_weights
from zoo import DIM, TOKENS, controlnet, ip_adapter, rand, sd, sdxl, seeded, unet, vae
from zoo import img2img as img2img_zoo

from diffusion_accel import ConfigurationError, LatentTransparency, ModelLoadError, UnsupportedPipelineError, accelerate
from diffusion_accel.transparency.codec import decode_rgba, encode_rgba
from diffusion_accel.transparency.files import ADAPTER, ADAPTERS, ENCODERS, find_parts
from diffusion_accel.transparency.images import rgba_tensor
from diffusion_accel.transparency.modules import LatentTransparencyDecoder, LatentTransparencyEncoder
from diffusion_accel.transparency.weights import load_part

WEIGHTS = tiny_weights()


def draw(pipe: Any, call: dict[str, Any], output: str = "pil", steps: int = 3, **changes: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(num_inference_steps=steps, generator=generator, **{**call, "output_type": output, **changes})


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


# ------------------------------------------------------------------------------------------- weights
def refused(pipe: Any, words: str, **values: Any) -> None:
    with pytest.raises(UnsupportedPipelineError, match=words):
        accelerate(pipe, LatentTransparency(**values))
    assert not hasattr(pipe, "acceleration")


def test_weights_beside_the_model_are_found(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe, call = sd()
    refused(pipe, "no weights for transparency are beside this model")
    pipe.save_pretrained(tmp_path)
    write_weights(tmp_path / "transparency", pipe.unet)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, **absent)
    accelerate(loaded, LatentTransparency())
    again = StableDiffusionPipeline(**{**loaded.components}, requires_safety_checker=False)
    accelerate(again, LatentTransparency(views=1))
    accelerate(pipe, LatentTransparency(weights=str(tmp_path)))
    assert draw(again, call).images[0].mode == draw(pipe, call).images[0].mode == "RGBA"


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pipe, _ = sd()
    refused(pipe, "no such folder of weights: ./nowhere", weights="./nowhere")
    refused(pipe, "no such adapter file", weights=WEIGHTS, adapter="nothing.safetensors")
    refused(pipe, "published ones exist for SD 1.5 and SDXL only", weights=str(tmp_path))
    refused(pipe, "no weights for the variant 'joint'", weights=WEIGHTS, variant="joint")
    folder = tmp_path / "wide"
    write_weights(folder, pipe.unet)
    tiny_decoder(latent_channels=8).save_pretrained(folder / "decoder")
    refused(pipe, "for latents of 8 channels and 1/2 of the images' sides, this VAE has 4 and 1/2", weights=str(folder))
    write_weights(folder, pipe.unet)
    save_file({"conv_in.weight": torch.zeros(3, 4, 3, 3)}, folder / ADAPTER)
    refused(pipe, "it is for another family of models", weights=str(folder))
    data = (folder / "decoder" / "diffusion_pytorch_model.safetensors").read_bytes()
    (folder / "decoder" / "diffusion_pytorch_model.safetensors").write_bytes(data[:-100])
    refused(pipe, "is cut off", weights=str(folder))


def family(width: int, **changes: Any) -> Any:
    pipe, call = sd()
    pipe.register_modules(unet=unet(cross_attention_dim=width, **changes))
    pipe.register_modules(
        vae=seeded(
            lambda: type(pipe.vae).from_config(
                {
                    **vae().config,
                    "block_out_channels": (8,) * 4,
                    "down_block_types": ("DownEncoderBlock2D",) * 4,
                    "up_block_types": ("UpDecoderBlock2D",) * 4,
                }
            )
        )
    )
    pipe.vae_scale_factor = 8
    embeds = {f"{k}prompt_embeds": rand(1, TOKENS, width, seed=s) for k, s in (("", 1), ("negative_", 2))}
    return pipe, {**call, **embeds, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with the published names, keys and sizes for SD 1.5, and of SDXL's what differs; random numbers."""
    folder = tmp_path_factory.mktemp("published")
    encoder, decoder = seeded(LatentTransparencyEncoder), seeded(LatentTransparencyDecoder)
    save_file(encoder.half().state_dict(), folder / "layer_sd15_vae_transparent_encoder.safetensors")
    save_file(decoder.half().state_dict(), folder / "layer_sd15_vae_transparent_decoder.safetensors")
    model = family(768)[0].unet
    for name, frames, control in (("transparent_attn", 1, False), ("joint", 3, False), ("bg2fg", 2, True)):
        save_file(sharing_tensors(model, frames, control), folder / f"layer_sd15_{name}.safetensors")
    return folder


def test_published_files_for_sd15(published: Path, tmp_path: Path) -> None:
    pipe, call = family(768)
    base = draw(pipe, call, "latent").images
    accelerate(pipe, LatentTransparency(weights=str(published), views=1))
    assert draw(pipe, call).images[0].mode == "RGBA"
    accelerate(pipe, LatentTransparency(weights=str(published), variant="joint", views=1))
    images = draw(pipe, {**call, "num_images_per_prompt": 3}).images
    assert [image.mode for image in images] == ["RGBA", "RGB", "RGB"]
    with pytest.raises(ConfigurationError, match="multiple of 3, got 2 rows"):
        draw(pipe, {**call, "guidance_scale": 1.0, "num_images_per_prompt": 2})
    latents = draw(pipe, {**call, "num_images_per_prompt": 3}, "latent").images
    accelerate(pipe, LatentTransparency(weights=str(published), variant="joint", views=1, until=0.5))
    partly = draw(pipe, {**call, "num_images_per_prompt": 3}, "latent").images
    assert not torch.equal(partly, latents), "the last steps are the base model's"
    Image.fromarray((rand(70, 50, 3).sigmoid() * 255).to(torch.uint8).numpy()).save(tmp_path / "bg.png")
    given = {"weights": str(published), "variant": "bg2fg", "background": str(tmp_path / "bg.png"), "views": 1}
    accelerate(pipe, LatentTransparency(**given))
    images = draw(pipe, {**call, "num_images_per_prompt": 2}).images
    assert [image.mode for image in images] == ["RGBA", "RGB"]
    with pytest.raises(ConfigurationError, match=r"transparent: background .*bg.png is not an image that can be read"):
        (tmp_path / "bg.png").write_bytes(b"nothing")
        draw(pipe, {**call, "num_images_per_prompt": 2})
    pipe.acceleration.remove()
    assert torch.equal(draw(pipe, call, "latent").images, base)
    refused(pipe, "does not exist for sd15; there are: fg, joint", weights=str(published), variant="fg-conv")


def test_published_files_for_sdxl(published: Path, tmp_path: Path) -> None:
    pipe, _ = family(
        2048, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64
    )
    refused(
        pipe, "no transparent decoder for sdxl .*it has the files of sd15, this model is sdxl", weights=str(published)
    )
    for name in ("ld_diffusers_sdxl_vae_transparent_encoder", "vae_transparent_encoder"):
        (tmp_path / f"{name}.safetensors").write_bytes(
            (published / "layer_sd15_vae_transparent_encoder.safetensors").read_bytes()
        )
    for name in ("ld_diffusers_sdxl_vae_transparent_decoder", "layer_xl_transparent_attn", "layer_xl_fg2ble"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    parts = find_parts(pipe, str(tmp_path), "fg", "")
    assert parts.offset_scale == 300.0 and parts.adapter.name == "layer_xl_transparent_attn.safetensors"
    with_factor = load_part(parts.encoder, LatentTransparencyEncoder, offset_scale=parts.offset_scale)
    (tmp_path / "ld_diffusers_sdxl_vae_transparent_encoder.safetensors").unlink()
    parts = find_parts(pipe, str(tmp_path), "fg2blend", "")
    assert parts.offset_scale == 1.0 and parts.adapter.name == "layer_xl_fg2ble.safetensors"
    plain = load_part(parts.encoder, LatentTransparencyEncoder, offset_scale=parts.offset_scale)
    x = rand(1, 4, 16, 16)
    assert torch.allclose(with_factor(x), 300 * plain(x), rtol=1e-5)
    assert set(ENCODERS) == set(ADAPTERS)


def test_an_sdxl_layer_is_drawn_for_a_given_one(tmp_path: Path) -> None:
    pipe, call = family(
        2048, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64
    )
    pipe.unet.config.addition_embed_type  # noqa: B018 - the family is told by it
    from diffusion_accel.transparency.attachment import TransparencyAttachment

    decoder = seeded(LatentTransparencyDecoder)
    save_file(decoder.half().state_dict(), tmp_path / "vae_transparent_decoder.safetensors")
    wide = torch.cat([torch.zeros(16, 4, 3, 3), rand(16, 4, 3, 3)], 1)
    save_file({"diffusion_model.input_blocks.0.0.weight::diff::0": wide}, tmp_path / "layer_xl_fg2ble.safetensors")
    layers = []
    for k in range(2):
        file = tmp_path / f"{k}.png"
        Image.fromarray((rand(64, 64, 4, seed=k).sigmoid() * 255).to(torch.uint8).numpy()).save(file)
        feature = LatentTransparency(weights=str(tmp_path), variant="fg2blend", foreground=str(file), views=1)
        attachment = TransparencyAttachment(feature, pipe)
        attachment.process_input({"height": 64, "width": 64})
        attachment.before_call(None)
        with torch.no_grad():
            layers.append(pipe.unet.conv_in(rand(2, 4, 8, 8)))
        attachment.after_call()
    assert pipe.unet.conv_in.weight.shape == (16, 4, 3, 3) and not torch.allclose(*layers, atol=1e-3)


def test_a_wrong_file_is_named(published: Path, tmp_path: Path) -> None:
    cases = [
        ("layer_sd15_vae_transparent_decoder", LatentTransparencyEncoder, "but a transparent decoder"),
        ("layer_sd15_vae_transparent_encoder", LatentTransparencyDecoder, "but a transparency encoder"),
        ("layer_sd15_joint", LatentTransparencyDecoder, "but attention-sharing modules for SD 1.5"),
    ]
    for name, cls, words in cases:
        with pytest.raises(ModelLoadError, match=words):
            load_part(published / f"{name}.safetensors", cls)
    save_file(tiny_changes(unet()), tmp_path / "a.safetensors")
    with pytest.raises(ModelLoadError, match="but an adapter of a base model"):
        load_part(tmp_path / "a.safetensors", LatentTransparencyDecoder)
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ModelLoadError, match="but something else"):
        load_part(tmp_path / "b.safetensors", LatentTransparencyDecoder)
    with pytest.raises(ModelLoadError, match="no such file"):
        load_part(tmp_path / "c.safetensors", LatentTransparencyDecoder)


def test_a_hub_id_without_a_connection_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pipe, _ = family(768)
    refused(pipe, "is not on this machine and cannot be downloaded", weights="LayerDiffusion/layerdiffusion-v1")
