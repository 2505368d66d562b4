"""Weights that are broken, changed or something else: one line from accelerate(), and the pipeline as it was."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transparency_weights import sharing_tensors, write_weights
from zoo import sd, unet

from diffusion_accel import AccelerationError, LatentTransparency, ModelLoadError, accelerate
from diffusion_accel.transparency.attention_sharing import Sharing
from diffusion_accel.transparency.files import ADAPTER
from diffusion_accel.transparency.weights import DIGESTS, check_digests, files_of, write_digests

Damage = Callable[[Path], None]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return sd()[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pipe: Any) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder, pipe.unet)
    return folder


def tensor(file: str, name: str | None, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Changes one tensor of a file, the first if none is named."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        key = name or next(iter(tensors))
        tensors[key] = change(tensors[key].clone()).contiguous()
        save_file(tensors, folder / file)

    return damage


def renamed(file: str, name: str) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        tensors[name] = tensors.pop("conv_in.bias")
        save_file(tensors, folder / file)

    return damage


def config(part: str, value: Any, key: str | None = None) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / part / "config.json"
        known = json.loads(file.read_text())
        file.write_text(json.dumps(value if key is None else known | {key: value}))

    return damage


def cut(file: str, size: int) -> Damage:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size]) and None


def pipe_file(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return damage


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(x: torch.Tensor) -> torch.Tensor:
        x.view(-1)[0] = value
        return x

    return change


DECODER, ENCODER, LOW = f"decoder/{WEIGHTS}", f"encoder/{WEIGHTS}", "conv_in.lora_A.weight"
CASES: list[tuple[str, Damage]] = [
    ("no numbers", tensor(DECODER, "conv_in.weight", first(float("nan")))),
    ("no numbers", tensor(ENCODER, None, first(float("-inf")))),
    ("no numbers", tensor(ADAPTER, "conv_in.bias", first(float("nan")))),
    ("weights are at most 65504", tensor(DECODER, "conv_in.weight", first(1e30))),
    ("holds no floating-point numbers", tensor(ENCODER, None, lambda x: x.int())),
    ("of other sizes", tensor(DECODER, "conv_in.weight", lambda x: x[:1])),
    ("of other sizes", tensor(ENCODER, None, lambda x: x.view(-1)[0])),
    ("it is for another family", tensor(ADAPTER, "conv_in.bias", lambda x: x[:3])),
    ("it is for another family", tensor(ADAPTER, "conv_in.weight", lambda x: x.repeat(1, 2, 1, 1))),
    ("has low-rank factors of the ranks", tensor(ADAPTER, None, lambda x: x)),  # see below
    ("does not have", renamed(ADAPTER, "down_blocks.99.weight")),
    ("does not have", renamed(ADAPTER, "forward.weight")),
    (r"\\x1b\]52", renamed(ADAPTER, "\x1b]52;c;x")),
    ("a name .*has 5000 characters", renamed(ADAPTER, "x" * 5000)),
    ("nothing an adapter", renamed(ADAPTER, "conv_in.weight::lora::7")),
    ("cut off", cut(DECODER, -9)),
    ("header is missing", cut(ENCODER, 5)),
    ("it is no regular file", pipe_file(ENCODER)),
    ("not a regular file", pipe_file("encoder/config.json")),
    ("it is no regular file", pipe_file(ADAPTER)),
    ("not valid JSON", cut("encoder/config.json", 30)),
    ("it is no table", config("decoder", [1])),
    ("latent_channels must be a number from 1 to 1024", config("encoder", 10**9, "latent_channels")),
    ("block_out_channels must be 2 to 12 whole numbers", config("decoder", [8, -8, 10**8], "block_out_channels")),
    ("block_out_channels must be 2 to 12 whole numbers", config("decoder", 8, "block_out_channels")),
    ("layers_per_block must be a number from 1 to 16", config("decoder", 10**7, "layers_per_block")),
    ("recommended_refinement must be a number from 0 to 1000", config("encoder", 10**9, "recommended_refinement")),
    ("offset_scale must be a number", config("encoder", "x", "offset_scale")),
    ("norm_num_groups must be a number", config("decoder", 0, "norm_num_groups")),
    ("describes no LatentTransparencyDecoder", config("decoder", 7, "norm_num_groups")),
]


@pytest.mark.parametrize(("words", "damage"), CASES, ids=[f"{k}-{words[:20]}" for k, (words, _) in enumerate(CASES)])
def test_damaged_weights_are_refused_in_one_line(
    words: str, damage: Damage, whole: Path, pipe: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(whole, folder)
    damage(folder)
    if "ranks" in words:
        tensors = load_file(folder / ADAPTER)
        key = next(name for name in tensors if name.endswith("lora_A.weight"))
        save_file(tensors | {key: tensors[key][:1]}, folder / ADAPTER)
    before = dict(pipe.unet.named_parameters())
    with pytest.raises(AccelerationError, match=words) as caught:
        accelerate(pipe, LatentTransparency(weights=str(folder)))
    assert len(str(caught.value).splitlines()) == 1 and "\x1b" not in str(caught.value)
    assert not hasattr(pipe, "acceleration")
    assert all(value is before[name] for name, value in pipe.unet.named_parameters())


def test_weights_with_digests_are_the_ones_that_were_written(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(whole, folder)
    write_digests(folder)
    check_digests(folder)
    rng = random.Random(0)
    for _ in range(40):
        file = rng.choice([*files_of(folder), folder / DIGESTS])
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        kept = file.read_bytes()
        file.write_bytes(data)
        if file.name == DIGESTS and _same_values(kept, bytes(data)):
            continue
        with pytest.raises(ModelLoadError):
            check_digests(folder)
        file.write_bytes(kept)
    (folder / "decoder" / WEIGHTS).unlink()
    with pytest.raises(ModelLoadError, match="lacks the file decoder/diffusion_pytorch_model.safetensors"):
        check_digests(folder)


def _same_values(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_the_embedded_weights_are_whole() -> None:
    from diffusion_accel.model_files.names import EMBEDDED, TRANSPARENCY

    folder = EMBEDDED["sticker"].path / TRANSPARENCY
    assert (folder / DIGESTS).is_file()
    check_digests(folder)


def test_damaged_sharing_modules_are_refused(tmp_path: Path) -> None:
    model = unet()
    whole = sharing_tensors(model, 2, control=True)
    file = tmp_path / "layer_sd15_bg2fg.safetensors"
    names = [
        "hookers.layers.0.to_q_lora.1.up.weight",
        "hookers.layers.1.temporal_q.weight",
        "hookers.layers.0.control_convs.0.2.weight",
        "kwargs_encoder.blocks_0.4.weight",
    ]
    Sharing(file, whole, model, 2)
    for name in names:
        for tensors in (
            {key: value for key, value in whole.items() if key != name},
            whole | {name: whole[name][:1]},
            whole | {name: whole[name].flatten()},
        ):
            with pytest.raises(ModelLoadError, match=f"is damaged: {name}"):
                Sharing(file, tensors, model, 2)
    for extra in ("hookers.layers.0.unknown", "hookers.layers.x.to_q_lora.0.up.weight", "other"):
        with pytest.raises(ModelLoadError, match="is damaged: .*nothing of this kind has it"):
            Sharing(file, whole | {extra: torch.zeros(1)}, model, 2)
