"""Where weights are looked for, which fit, and the published files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transparency_weights import WEIGHTS, draw, sharing_tensors, tiny_changes, tiny_decoder, write_weights
from zoo import TOKENS, rand, sd, seeded, unet, vae

from diffusion_accel import ConfigurationError, LatentTransparency, ModelLoadError, UnsupportedPipelineError, accelerate
from diffusion_accel.transparency.files import ADAPTER, ADAPTERS, ENCODERS, find_parts
from diffusion_accel.transparency.modules import LatentTransparencyDecoder, LatentTransparencyEncoder
from diffusion_accel.transparency.weights import load_part


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


@pytest.mark.slow
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


@pytest.mark.slow
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
