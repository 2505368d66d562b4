"""A transformer by the same recipe: its own VAE, tokenizers, text encoders, and the stock pipeline that comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from recipe import SIZE, TINY, once, small_batches, trainer
from sticker import data as sticker_data
from sticker import settings as stage_settings
from sticker import stages
from sticker.export import denoiser_of
from sticker.flux import STATES_LENGTH
from sticker.latents import PatchCodec, write_encoder
from sticker.models import Shape, build_vae

from diffusion_accel.training import archives
from diffusion_accel.training.files import UsageError
from diffusion_accel.training.state import load_average

SHAPE = TINY | {
    "patch": 4,
    "latent_channels": 4,
    "vae_channels": [16, 32, 32],
    "transformer_blocks": [1, 1],
    "transformer_heads": 2,
    "states_layers": 1,
    "text_from": None,
    "training": {"denoiser": {"lr": 5e-4}},
}


@pytest.fixture(scope="session")
def flux(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder after all stages of a transformer. Not to be changed."""

    def make(folder: Path) -> None:
        (folder / "shape-given.json").write_text(json.dumps(SHAPE))
        files = ["--data", str(data), "--work", str(folder), "--shape", str(folder / "shape-given.json")]
        chosen = ["--styles", "flat,3d", "--concepts", str(data / "concepts.txt"), "--around", "blob"]
        drawn = ["--sampling-steps", "2", "--count", "2", "--prompts", "red disc", "--log-every", "1"]
        steps = [f"--{stage}-steps=2" for stage in ("decoder", "text", "denoiser", "finish")]
        with small_batches(stage_settings.TUNED):
            assert trainer.main(["all", *files, *chosen, *drawn, *steps, "--task-routing"]) == 0

    return once(tmp_path_factory, "sticker-flux", make)


def test_the_folder_is_a_flux_pipeline(flux: Path) -> None:
    pipe = FluxPipeline.from_pretrained(flux / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.config["_task_routing"]["time"] == "unit"
    assert pipe.tokenizer_2("Red DISC").input_ids == pipe.tokenizer_2("red disc").input_ids
    call = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "true_cfg_scale": 3.0, "negative_prompt": ""}
    image = pipe("red disc", **call, max_sequence_length=STATES_LENGTH).images[0]
    assert image.size == (SIZE, SIZE)
    result = json.loads((flux / "evaluate.json").read_text())
    assert result["train"]["retrieval"]["n"] == 2


@torch.no_grad()
def test_a_training_call_is_what_the_pipeline_calls(flux: Path) -> None:
    torch.manual_seed(0)
    shape = Shape.of_work(flux)
    denoiser = denoiser_of(flux, shape).eval()
    torch.nn.init.normal_(denoiser.core.proj_out.weight, std=0.1)  # it begins at zero
    tokenizers = [sticker_data.load_tokenizer(flux), sticker_data.load_states_tokenizer(flux)]
    ids = sticker_data.token_ids(tokenizers, ["red disc, 3d style"])
    x = torch.randn(1, 4, SIZE // 4, SIZE // 4)
    got = denoiser(x, torch.tensor([250.0]), ids)

    pipe = FluxPipeline(None, None, denoiser.text, tokenizers[0], denoiser.states, tokenizers[1], denoiser.core)
    states, pooled, text_ids = pipe.encode_prompt("red disc, 3d style", None, max_sequence_length=STATES_LENGTH)
    size = SIZE // 4
    tokens = pipe._pack_latents(x, 1, 4, size, size)
    image_ids = pipe._prepare_latent_image_ids(1, size // 2, size // 2, "cpu", x.dtype)
    predicted = denoiser.core(tokens, states, pooled, torch.tensor([0.25]), image_ids, text_ids).sample
    wanted = pipe._unpack_latents(predicted, SIZE, SIZE, 4)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_training_begins_with_the_weights_of_a_pipeline(flux: Path) -> None:
    """Those of `export` are the averaged ones of the last stage, in half precision."""
    start = ["--work", str(flux), "--start", str(flux / "pipeline")]
    trained = denoiser_of(flux, Shape.of_work(flux))
    load_average(flux / "finish", trained, "finish")
    begun = dict(stages.denoiser_task(trainer.make_parser().parse_args(["denoiser", *start])).model.named_parameters())
    for name, parameter in trained.named_parameters():
        assert torch.equal(begun[name], parameter.half().float()), name
    decoder = build_vae(Shape.of_work(flux)).decoder
    load_average(flux / "decoder", decoder, "decoder")
    begun = dict(stages.decoder_task(trainer.make_parser().parse_args(["decoder", *start])).model.named_parameters())
    for name, parameter in decoder.named_parameters():
        assert torch.equal(begun[name], parameter.half().float()), name


@pytest.mark.parametrize("stage", ["denoiser", "decoder"])
def test_weights_of_another_model(flux: Path, stage: str) -> None:
    task = {"denoiser": stages.denoiser_task, "decoder": stages.decoder_task}[stage]
    for source, reason in (("sticker", "are those of another model"), (str(flux), "is not a pipeline folder")):
        options = trainer.make_parser().parse_args([stage, "--work", str(flux), "--start", source])
        with pytest.raises(UsageError, match=reason):
            task(options)


def test_the_written_encoder_of_three_levels_is_the_convolution(flux: Path) -> None:
    codec, vae = PatchCodec.load(flux / "codec.safetensors"), build_vae(Shape.of_work(flux))
    images = archives.on_colours(sticker_data.load_images(flux))
    write_encoder(vae, codec, images)
    with torch.no_grad():
        expected, got = codec.encode(images), vae.encode(images).latent_dist.mean
    assert got.shape[-1] == SIZE // 4
    assert (got - expected).norm() / expected.norm() < 2e-3
