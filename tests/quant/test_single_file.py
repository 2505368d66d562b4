"""Quantizing single files in the layout of a model's authors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from model_folder import draw, write_folder
from original_files import write_original
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusion_accel import quantize_files
from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.quant.single_file import Made, denoiser_tensors, read
from diffusion_accel.quant.stored import find_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"


def half(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float16)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline folder in half precision, and the same as a single file."""
    root = tmp_path_factory.mktemp("sd")
    pipe = half(write_folder(root / "whole"))
    pipe.save_pretrained(root / "pipe")
    return root / "pipe", write_original(pipe, root / "pipe.safetensors")


def same(one: Path, other: Path, *parts: str) -> bool:
    """Whether weights and configurations of the parts are equal."""
    for part in parts:
        for file in sorted((one / part).iterdir()):
            twin = other / part / file.name
            if file.suffix == ".safetensors":
                tensors, twins = load_file(file), load_file(twin)
                equal = tensors.keys() == twins.keys() and all(
                    value.dtype == twins[name].dtype and torch.equal(value, twins[name])
                    for name, value in tensors.items()
                )
            else:
                notes = ("_name_or_path", "_diffusers_version", "dtype", "torch_dtype", "transformers_version")
                tables = [json.loads(f.read_text(encoding="utf-8")) for f in (file, twin)]
                plain = [{k: v for k, v in table.items() if k not in notes} for table in tables]
                equal = plain[0] == plain[1]
            assert equal, file
    return True


@pytest.mark.parametrize("bits", [{"weight_bits": 4, "group": 16}, {"activation_bits": 8}])
def test_a_file_becomes_what_its_folder_becomes(sd: tuple[Path, Path], tmp_path: Path, bits: dict[str, int]) -> None:
    folder, file = sd
    first = quantize_files(folder, tmp_path / "folder", **bits)  # type: ignore[arg-type]
    second = quantize_files(file, tmp_path / "file", config=folder, **bits)  # type: ignore[arg-type]
    assert (first.sqnr, first.bytes, first.parameters) == (second.sqnr, second.bytes, second.parameters)
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "file/unet" / name).read_bytes() == (tmp_path / "folder/unet" / name).read_bytes()
    assert same(tmp_path / "folder", tmp_path / "file", "vae", "text_encoder", "scheduler")
    pipes = [DiffusionPipeline.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("folder", "file")]
    assert torch.equal(draw(pipes[0]), draw(pipes[1]))


def encoder(cls: Any, width: int) -> Any:
    config = CLIPTextConfig(
        vocab_size=12, hidden_size=width, intermediate_size=width, projection_dim=zoo.DIM, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return zoo.seeded(lambda: cls(config))


def test_a_file_of_sdxl(tmp_path: Path) -> None:
    pipe, call = zoo.sdxl()
    pipe.register_modules(
        text_encoder=encoder(CLIPTextModel, 8), text_encoder_2=encoder(CLIPTextModelWithProjection, 24)
    )
    pipe.save_pretrained(tmp_path / "pipe")
    file = write_original(pipe, tmp_path / "pipe.safetensors")
    quantize_files(tmp_path / "pipe", tmp_path / "folder", weight_bits=4, group=16)
    quantize_files(file, tmp_path / "file", weight_bits=4, group=16, config=str(tmp_path / "pipe"))
    twins = [tmp_path / name / "unet" / WEIGHTS for name in ("folder", "file")]
    assert twins[0].read_bytes() == twins[1].read_bytes()
    assert same(tmp_path / "folder", tmp_path / "file", "vae", "text_encoder", "text_encoder_2", "scheduler")
    images = [zoo.run(DiffusionPipeline.from_pretrained(tmp_path / name), call) for name in ("folder", "file")]
    assert torch.equal(images[0], images[1])


def sd3_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What an SD 3 transformer is in the layout of its authors: queries, keys and values in one, scale before shift."""
    state, found = model.state_dict(), {}
    last = model.config.num_layers - 1
    swapped = {"norm_out.linear": "final_layer.adaLN_modulation.1"}
    swapped[f"transformer_blocks.{last}.norm1_context.linear"] = f"joint_blocks.{last}.context_block.adaLN_modulation.1"
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
    }
    for n in range(last + 1):
        block, to = f"transformer_blocks.{n}", f"joint_blocks.{n}"
        names |= {
            f"{block}.attn.to_out.0": f"{to}.x_block.attn.proj",
            f"{block}.attn.to_add_out": f"{to}.context_block.attn.proj",
            f"{block}.norm1.linear": f"{to}.x_block.adaLN_modulation.1",
            f"{block}.ff.net.0.proj": f"{to}.x_block.mlp.fc1",
            f"{block}.ff.net.2": f"{to}.x_block.mlp.fc2",
            f"{block}.ff_context.net.0.proj": f"{to}.context_block.mlp.fc1",
            f"{block}.ff_context.net.2": f"{to}.context_block.mlp.fc2",
        }
        if n != last:
            names[f"{block}.norm1_context.linear"] = f"{to}.context_block.adaLN_modulation.1"
        for leaf in ("weight", "bias"):
            for side, parts in (
                ("x", ("to_q", "to_k", "to_v")),
                ("context", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ):
                stacked = torch.cat([state[f"{block}.attn.{part}.{leaf}"] for part in parts])
                found[f"{to}.{side}_block.attn.qkv.{leaf}"] = stacked
    for name, to in (names | swapped).items():
        for leaf in ("weight", "bias"):
            if f"{name}.{leaf}" in state:
                value = state[f"{name}.{leaf}"]
                found[f"{to}.{leaf}"] = torch.cat(value.chunk(2)[::-1]) if name in swapped else value
    found["pos_embed"] = state["pos_embed.pos_embed"]
    return {f"model.diffusion_model.{name}": value.contiguous() for name, value in found.items()}


def test_tensors_that_are_cut_and_joined(tmp_path: Path) -> None:
    """SD 3 has queries, keys and values in one; its file is of the denoiser alone, so the others are the folder's."""
    pipe, call = zoo.sd3()
    pipe.save_pretrained(tmp_path / "pipe")
    save_file(sd3_tensors(pipe.transformer), tmp_path / "sd3.safetensors")
    with torch.device("meta"):
        empty = SD3Transformer2DModel.from_config(pipe.transformer.config)
    held = find_tensors([tmp_path / "sd3.safetensors"])
    found = denoiser_tensors(tmp_path / "sd3.safetensors", held, empty)
    state = pipe.transformer.state_dict()
    assert found.keys() == state.keys() and any(isinstance(tensor, Made) for tensor in found.values())
    for name, tensor in found.items():
        assert torch.equal(read(tensor), state[name]), name
        assert tensor.shape == state[name].shape and b"".join(tensor.chunks()) == state[name].numpy().tobytes()
    quantize_files(tmp_path / "pipe", tmp_path / "folder")
    quantize_files(tmp_path / "sd3.safetensors", tmp_path / "file", config=tmp_path / "pipe")
    twins = [tmp_path / name / "transformer" / WEIGHTS for name in ("folder", "file")]
    assert twins[0].read_bytes() == twins[1].read_bytes()
    none = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    images = [zoo.run(DiffusionPipeline.from_pretrained(tmp_path / n, **none), call) for n in ("folder", "file")]
    assert torch.equal(images[0], images[1])


def test_a_denoiser_alone_in_the_names_of_diffusers(sd: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = sd
    file = folder / "unet" / WEIGHTS
    quantize_files(folder, tmp_path / "folder")
    quantize_files(file, tmp_path / "file", config=folder)
    for part in (p.relative_to(folder) for p in folder.rglob("*") if p.is_file()):
        assert (tmp_path / "file" / part).read_bytes() == (tmp_path / "folder" / part).read_bytes(), part


def test_values_that_are_made_are_noted_exactly(tmp_path: Path) -> None:
    """What converters do to tensors, on ones without values and on real ones."""
    from diffusion_accel.quant.single_file import _later

    value = torch.randn(6, 4, 1)
    save_file({"x": value}, tmp_path / "x.safetensors")
    later = _later(find_tensors([tmp_path / "x.safetensors"])["x"])
    ways: list[Callable[[Any], Any]] = [
        lambda x: x[:, :, 0],
        lambda x: x.squeeze(-1).T,
        lambda x: torch.cat([x.chunk(2, dim=0)[1], torch.split(x, (2, 4), dim=0)[0]], dim=0),
        lambda x: x.reshape(3, -1).to(torch.bfloat16).clone(),
        lambda x: torch.stack([x, x])[1],
    ]
    assert later.shape == value.shape and later.dtype is value.dtype and later.ndim == 3
    for way in ways:
        made = way(later)
        assert torch.equal(made.make(), way(value)) and made.shape == way(value).shape


def test_ended_midway_nothing_half_written_is_left(
    sd: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = sd
    quantize_files(file, tmp_path / "made", config=folder)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}

    def end(name: str, _share: float, _left: float | None) -> None:
        if "mid_block" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_files(file, tmp_path / "made", weight_bits=4, config=folder, overwrite=True, progress=end)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_what_does_not_fit_is_refused_and_leaves_nothing(
    sd: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = sd

    def changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, tmp_path / "source.safetensors")
        return tmp_path / "source.safetensors"

    def without(start: str) -> Callable[[dict[str, torch.Tensor]], Any]:
        return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(start)]

    unet = "model.diffusion_model."
    cases: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
        (without(unet + "out.2.weight"), "they lack conv_out.weight"),
        (without(unet), "no weights of a UNet2DConditionModel"),
        (lambda t: t.update({unet + "out.2.weight": torch.zeros(2)}), "another shape of conv_out.weight"),
        (lambda t: t[unet + "out.2.weight"].view(-1)[:1].fill_(float("nan")), "no finite numbers"),
        (
            lambda t: t["first_stage_model.encoder.conv_in.weight"].fill_(float("nan")),
            "of the vae in .* no finite numbers",
        ),
        (without("first_stage_model.decoder.conv_in.weight"), "other parts of .* weights of one are missing"),
        (lambda t: t.update({unet + "out.2.weight": t[unet + "out.2.weight"].int()}), "not floating point"),
    ]
    for change, says in cases:
        with pytest.raises(ModelLoadError, match=says) as error:
            quantize_files(changed(change), tmp_path / "made", config=folder)
        assert "\n" not in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == ["source.safetensors"], says
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ModelLoadError, match=r"stable-diffusion-v1-5/stable-diffusion-v1-5\) .*or give config"
    ) as error:
        quantize_files(file, tmp_path / "made")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigurationError, match="config must be a pipeline folder or a hub id"):
        quantize_files(file, tmp_path / "made", config="./nowhere")
    with pytest.raises(ConfigurationError, match="config is for a single file"):
        quantize_files(folder, tmp_path / "made", config=folder)
    shutil.copytree(folder, tmp_path / "configs")
    (tmp_path / "configs/vae" / WEIGHTS).unlink()
    with pytest.raises(ModelLoadError, match="holds a denoiser only, and .*vae has no safetensors weights"):
        quantize_files(folder / "unet" / WEIGHTS, tmp_path / "made", config=tmp_path / "configs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["configs", "source.safetensors"]
