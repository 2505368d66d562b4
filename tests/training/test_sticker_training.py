"""The sticker training programs on a tiny synthetic data set: exactness, resuming, export, and errors."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import signal
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from sticker import data as sticker_data
from sticker import stages
from sticker.latents import PatchCodec, write_encoder
from sticker.models import Shape, build_vae
from sticker.tasks import Captioned, DecoderTask, TextTask

from diffusion_accel.training import archives
from diffusion_accel.training.files import UsageError, read_json_lines
from diffusion_accel.training.loop import Settings, train

SCRIPTS = Path(__file__).parents[2] / "scripts"
CONCEPTS = ("red disc", "blue disc", "green ring", "yellow square", "orange ring", "pink square")
COLOURS = ((220, 40, 40), (40, 60, 220), (40, 180, 60), (230, 210, 40), (240, 140, 30), (240, 120, 180))
SIZE = 48
STAGES = ("decoder", "text", "unet", "finish")
TINY = {
    "size": SIZE,
    "vae_channels": [16, 32, 64, 64],
    "vocabulary": 560,
    "unet_channels": [32, 64],
    "unet_groups": 8,
    "text_width": 32,
    "text_layers": 1,
}


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


trainer = load_script("train_sticker")
builder = load_script("build_sticker_dataset")


def draw_image(index: int, soft: float) -> Image.Image:
    """A disc, ring or square with soft edges and a shaded fill."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
    distance = np.maximum(abs(x), abs(y)) if index in (3, 5) else np.hypot(x, y)
    alpha = 1 / (1 + np.exp((distance - 0.3) * soft))
    if index in (2, 4):
        alpha *= 1 / (1 + np.exp((0.15 - distance) * soft))
    shade = (0.8 + 0.4 * x + 0.2 * np.sin(9 * y + index))[..., None]
    rgb = np.clip(np.array(COLOURS[index]) * shade, 0, 255)
    return Image.fromarray(np.concatenate([rgb, alpha[..., None] * 255], -1).astype(np.uint8), "RGBA")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six concepts in two core styles and another one; one image is held out."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for style, soft in (("flat", 120.0), ("3d", 30.0), ("blob", 60.0)):
        with zipfile.ZipFile(folder / f"{style}.zip", "w") as archive:
            for i, name in enumerate(CONCEPTS):
                file = io.BytesIO()
                draw_image(i, soft).save(file, "WEBP", lossless=True)
                archive.writestr(f"{i}.webp", file.getvalue())
                rows.append(
                    {"id": f"{style}/{i}", "style": style, "style_words": style, "slug": name.replace(" ", "-")}
                    | {"name": name, "keywords": [name.split()[0], "shape"], "group": "objects", "subgroup": "toys"}
                    | {"core": style != "blob", "starter": True, "file": f"{style}.zip:{i}.webp"}
                    | {"split": "heldout" if (style, i) == ("3d", 2) else "train"}
                )
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "concepts.txt").write_text("# all\n" + "\n".join(row["slug"] for row in rows[:6]) + "\n")
    (folder / "shape.json").write_text(json.dumps(TINY))
    return folder


@pytest.fixture(scope="module")
def work(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder after all stages, with the exported pipeline in ``pipeline``."""
    folder = tmp_path_factory.mktemp("work")
    steps = [f"--{stage}-steps=3" for stage in STAGES]
    code = trainer.main(
        [
            "all",
            "--data",
            str(data),
            "--work",
            str(folder),
            "--shape",
            str(data / "shape.json"),
            "--styles",
            "flat,3d",
            "--concepts",
            str(data / "concepts.txt"),
            "--sampling-steps",
            "2",
            "--count",
            "4",
            "--around",
            "blob",
            "--prompts",
            "red disc|blue disc",
            "--log-every",
            "1",
            "--grid-every",
            "3",
            *steps,
        ]
    )
    assert code == 0
    return folder


def unet_task(work: Path) -> Any:
    return stages.unet_task(trainer.make_parser().parse_args(["unet", "--work", str(work)]))


def settings(**changes: Any) -> Settings:
    defaults: dict[str, Any] = {"steps": 6, "batch": 4, "lr": 1e-3, "log_every": 2, "eval_every": 3, "grid_every": 0}
    return Settings(**(defaults | changes))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / json.loads((folder / "state.json").read_text())["tensors"])


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = read_json_lines(folder / "log.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


# ------------------------------------------------------------------------------------------- latents, captions, noise
def test_images_around_the_list_are_drawn_a_third_as_often_and_not_watched(work: Path) -> None:
    captioned = Captioned.load(work)
    styles = [row["style"] for row in captioned.rows]
    assert len(captioned.watched) == 11 and len(captioned.heldout) == 1 and len(captioned.rows) == 18
    counts = np.bincount(captioned.train, minlength=18)
    assert [counts[i] for i in captioned.watched] == [3] * 11 and counts[captioned.heldout[0]] == 0
    assert all(counts[i] == 1 for i in range(18) if styles[i] == "blob")


def test_written_encoder_equals_the_convolution(work: Path) -> None:
    codec = PatchCodec.load(work / "codec.safetensors")
    images = archives.on_colours(sticker_data.load_images(work))
    vae = build_vae(Shape.of_work(work))
    write_encoder(vae, codec, images)
    with torch.no_grad():
        expected, got = codec.encode(images), vae.encode(images).latent_dist.mean
    assert (got - expected).norm() / expected.norm() < 1e-2
    assert expected.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)
    linear = codec.decode(expected)
    assert (linear - images).square().mean() < 0.05 * images.var()


def test_tokenizer_round_trip(work: Path) -> None:
    tokenizer = sticker_data.load_tokenizer(work)
    ids = tokenizer("a red disc, 3d style").input_ids
    assert ids[0] == tokenizer.bos_token_id == len(tokenizer) - 2
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red disc , 3 d style"
    assert tokenizer.decode(tokenizer("zebra Ünï 7").input_ids, skip_special_tokens=True) == "zebra ünï 7"
    tokens = sticker_data.load_tokens(work)
    first = archives.caption_variants(sticker_data.load_rows(work)[0])[0]
    padded = tokenizer(first, padding="max_length", max_length=24).input_ids
    assert tokens["captions"][0, 0].tolist() == padded


def test_learning_rate_depends_on_the_step_alone() -> None:
    linear = settings(steps=100, warmup=10, cooldown=0.4, minutes=1)
    assert linear.rate(0) == pytest.approx(1e-4) and linear.rate(30) == 1e-3
    assert linear.rate(80) == pytest.approx(5e-4) and 0 < linear.rate(99) < 1e-4
    cosine = settings(steps=100, warmup=10, cooldown=1.0, curve="cosine")
    assert cosine.rate(50) == pytest.approx(1e-3 * 0.5 * (1 - math.cos(math.pi / 2)))


# ------------------------------------------------------------------------------------------- the loop
@pytest.mark.parametrize("make", [DecoderTask, TextTask, unet_task])
def test_resumed_run_equals_an_uninterrupted_one(make: Any, work: Path, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert train(make(work), tmp_path / "whole", settings(), accelerator).finished

    task = make(work)
    draw, calls = task.draw, []

    def interrupted(rng: np.random.Generator, size: int) -> Any:
        calls.append(size)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(rng, size)

    task.draw = interrupted
    outcome = train(task, tmp_path / "parts", settings(), accelerator)
    assert (outcome.step, outcome.finished, outcome.signal) == (3, False, signal.SIGTERM)
    with pytest.raises(UsageError, match="--resume"):
        train(make(work), tmp_path / "parts", settings(), accelerator)
    assert train(make(work), tmp_path / "parts", settings(), accelerator, resume=True).finished

    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    whole, parts = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert {part.split(".")[0] for part in whole} == {"model", "average", "optimizer"}


def test_accumulation_changes_only_rounding(work: Path, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    for parts in (1, 2):
        train(TextTask(work), tmp_path / str(parts), settings(steps=2, log_every=1, accumulation=parts), accelerator)
    losses = [[line["loss"] for line in log_of(tmp_path / part)] for part in "12"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_changed_seed_is_refused_on_resume(work: Path, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    train(TextTask(work), tmp_path, settings(steps=1), accelerator)
    with pytest.raises(UsageError, match="seed 0"):
        train(TextTask(work), tmp_path, settings(seed=1), accelerator, resume=True)
    with pytest.raises(UsageError, match="cannot be divided"):
        train(TextTask(work), tmp_path / "new", settings(batch=3, accumulation=2), accelerator)


def test_work_folder_holds_no_pickles(work: Path) -> None:
    suffixes = {file.suffix for file in work.rglob("*") if file.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".png", ".npy", ".txt"}
    np.load(work / "images.npy", allow_pickle=False)
    for stage in STAGES:
        names = {file.name for file in (work / stage).iterdir()}
        assert {"state.json", "state-00000003.safetensors", "log.jsonl", "grid-000003.png"} <= names


# ------------------------------------------------------------------------------------------- the command line
def test_export_loads_and_draws(work: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(work / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == pipeline.vae.dtype == torch.float32
    image = pipeline("red disc, 3d style", num_inference_steps=2).images[0]
    assert image.size == (SIZE, SIZE)
    stored = load_file(work / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    average = tensors_of(work / "finish")["average.unet.conv_in.weight"]
    assert torch.equal(stored["conv_in.weight"], average.half())
    result = json.loads((work / "evaluate.json").read_text())
    assert result["train"]["retrieval"]["n"] == 4 and result["heldout"]["retrieval"]["n"] == 1
    assert len(result["train"]["v_error"]["bins"]) == 4
    assert Image.open(work / "grid.png").size == (2 * SIZE, 2 * SIZE)


def test_unusable_input_gives_one_line(
    work: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def attempt(*arguments: object) -> tuple[int, str]:
        code = trainer.main([str(argument) for argument in arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in lines[0]
        return code, lines[0]

    new = tmp_path / "new"
    assert attempt("cache", "--data", tmp_path / "nothing", "--work", new)[0] == 2
    (tmp_path / "captions.jsonl").write_text("not json\n")
    code, line = attempt("cache", "--data", tmp_path, "--work", new)
    assert code == 1 and "captions.jsonl" in line
    (tmp_path / "captions.jsonl").write_text('{"id": 1}\n')
    assert "line 1: no style" in attempt("cache", "--data", tmp_path, "--work", new)[1]
    (tmp_path / "captions.jsonl").write_text((data / "captions.jsonl").read_text())
    code, line = attempt("cache", "--data", tmp_path, "--work", new)
    assert code == 1 and "flat.zip" in line
    code, line = attempt("text", "--work", new)
    assert code == 2 and "'latents' stage" in line
    code, line = attempt("text", "--work", work)
    assert code == 2 and "--resume" in line
    code, line = attempt("export", "--work", work)
    assert code == 2 and "--overwrite" in line
    code, line = attempt("latents", "--work", work, "--styles", "oil", "--concepts", data / "concepts.txt")
    assert code == 2 and "oil" in line
    with pytest.raises(SystemExit) as usage:
        trainer.main(["text", "--steps", "0"])
    assert usage.value.code == 2


# ------------------------------------------------------------------------------------------- the data set builder
def test_builder_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    arguments = ["--out", str(out), "--npm-cache", str(cache)]
    monkeypatch.setattr(builder.shutil, "which", lambda name: None)
    assert builder.main(arguments) == 1
    assert "npm is not on the PATH" in capsys.readouterr().err
    (cache / builder.NAMES.filename).write_bytes(b"not a package")
    assert builder.main(arguments) == 1
    assert "pinned checksum" in capsys.readouterr().err
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["cache"]
    out.mkdir()
    with pytest.raises(SystemExit) as usage:
        builder.main(arguments)
    assert usage.value.code == 2


def test_builder_names_and_pixels() -> None:
    assert builder.slug("Woman’s Hat & Piñata") == "womans-hat-and-pinata"
    assert builder.clean_label("Flag: Côte-d’Or (old)") == "flag cote d'or old"
    assert {"red heart", "rocket"} <= builder.read_starter_names()
    edge = Image.fromarray(np.array([[[255, 0, 0, 255], [0, 255, 0, 0]]], np.uint8).repeat(2, 0), "RGBA")
    small = builder.resize_rgba(edge, 1)
    assert small[0, 0, 0] == 255 and small[0, 0, 1] == 0 and 100 < small[0, 0, 3] < 155


def test_transparency_is_trained_around_the_frozen_pipeline(work: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from sticker.low_rank import add_low_rank, low_rank_changes, set_low_rank
    from sticker.transparency.pair import Pair, sharpen
    from sticker.transparency.tasks import JointTask

    from diffusion_accel import LatentTransparency, accelerate
    from diffusion_accel.transparency.adapter import Adapter, read_changes

    transparency, out = load_script("train_transparency"), tmp_path / "weights"
    steps = [f"--{stage}-steps=3" for stage in ("encoder", "decoder", "joint", "unet", "refine")]
    common = ["--work", str(work), "--model", str(work / "pipeline"), "--out", str(out), "--rank", "4"]
    flags = ["--log-every", "1", "--eval-every", "3", "--grid-every", "0"]
    assert transparency.main(["all", *common, *steps, *flags]) == 0
    assert transparency.main(["all", *common, *steps, *flags]) == 2, "there is a run already"
    assert transparency.main(["export", *common]) == 2, "the folder exists"
    pipe = StableDiffusionPipeline.from_pretrained(work / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    fresh = {}
    for part in ("encoder", "decoder"):
        torch.manual_seed(0)
        fresh[part] = Pair(pipe.vae).state_dict()
        trained = tensors_of(work / "transparency" / part)
        moved = {n for n, v in fresh[part].items() if not torch.equal(trained[f"model.{n}"], v)}
        begun = {n for n, v in tensors_of(work / "transparency" / "encoder").items() if n.startswith("average.")}
        if part == "encoder":
            assert moved and all(name.startswith("encoder.") for name in moved)
        else:
            kept = tensors_of(work / "transparency" / "encoder")
            assert all(torch.equal(trained[n.replace("average.", "model.")], kept[n]) for n in begun), "frozen"
            assert any(name.startswith("decoder.") for name in moved)
    states = {part: tensors_of(work / "transparency" / part) for part in ("decoder", "joint", "refine")}
    for name in fresh["decoder"]:
        begun = states["decoder"].get(f"average.{name}", states["decoder"][f"model.{name}"])
        assert not torch.equal(states["joint"][f"model.{name}"], begun), "both are trained"
        kept = torch.equal(states["refine"][f"model.{name}"], states["joint"][f"average.{name}"])
        assert kept == name.startswith("encoder."), "the decoder alone"
    evaluated = json.loads((work / "transparency" / "decoder" / "log.jsonl").read_text().splitlines()[-1])
    assert {"alpha", "composite", "vae", "moved", "offset"} <= set(evaluated)
    base = pipe("red disc", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    accelerate(pipe, LatentTransparency(weights=str(out), views=1))
    made = pipe("red disc", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert made.mode == "RGBA" and made.size == base.size
    # the weights in a folder are a beginning, where no earlier stage has left any
    bare = tmp_path / "work"
    bare.mkdir()
    for file in ("images.npy", "rows.jsonl", "shape.json"):
        (bare / file).symlink_to(work / file)
    model = JointTask(bare, pipe.vae, start=out).model
    sharpen(model.decoder)  # which begins as it was before it was exported
    begun = model.state_dict()
    for part in ("encoder", "decoder"):
        stored = load_file(out / part / "diffusion_pytorch_model.safetensors")
        assert all(torch.allclose(begun[f"{part}.{name}"], value.float(), atol=1e-6) for name, value in stored.items())
    with pytest.raises(UsageError, match="'encoder' stage"):
        JointTask(bare, pipe.vae)
    more = ["joint", "--work", str(bare), "--model", str(work / "pipeline"), "--from", str(out), "--steps", "1"]
    assert transparency.main([*more, *flags]) == 0
    again = ["export", *more[1:-2], "--out", str(tmp_path / "again")]
    assert transparency.main(again) == 0, "the stages after those that have run are not needed"
    joined = tensors_of(bare / "transparency" / "joint")["average.encoder.blocks.0.weight"]
    exported = load_file(tmp_path / "again" / "encoder" / "diffusion_pytorch_model.safetensors")["blocks.0.weight"]
    assert torch.equal(exported, joined.half())
    assert transparency.main(["latents", "--work", str(bare), *common[2:]]) == 2, "no latents to follow"
    # what the file holds is what was trained
    model, x = pipe.unet, torch.randn(1, pipe.unet.config.in_channels, 6, 6)
    text = torch.randn(1, 4, TINY["text_width"])
    plain = {n: v.clone() for n, v in model.state_dict().items()}
    twin = type(model).from_config(model.config)
    twin.load_state_dict(plain)
    add_low_rank(twin, 4)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        from safetensors.torch import save_file

        save_file(low_rank_changes(twin, model), tmp_path / "adapter.safetensors")
        file = tmp_path / "adapter.safetensors"
        adapter = Adapter(read_changes(file, load_file(file)))
        base_prediction = model.eval()(x, 10, text).sample
        adapter.apply(model)
        adapted, trained_prediction = model(x, 10, text).sample, twin.eval()(x, 10, text).sample
        adapter.restore()
        again = type(model).from_config(model.config)
        again.load_state_dict(plain)
        add_low_rank(again, 4)
        set_low_rank(again, load_file(file))
        begun_prediction = again.eval()(x, 10, text).sample
    moved = (adapted - base_prediction).abs().max()
    assert (adapted - trained_prediction).abs().max() < 1e-2 * moved
    assert (adapted - begun_prediction).abs().max() < 1e-4 * moved, "one can go on from the file"
    other = type(model).from_config(model.config)
    add_low_rank(other, 2)
    with pytest.raises(UsageError, match="rank"):
        set_low_rank(other, load_file(file))


def test_the_code_of_alpha_is_hardly_seen_by_the_decoder(work: Path) -> None:
    from diffusers import AutoencoderKL
    from sticker.transparency.images import rgba_of
    from sticker.transparency.pair import AMPLITUDE, COMPONENTS, alpha_code

    from diffusion_accel.transparency.rgba import on_grey

    vae = AutoencoderKL.from_pretrained(work / "pipeline", subfolder="vae")
    rgb, alpha = rgba_of(sticker_data.load_images(work), np.arange(12))
    kernel, bias = alpha_code(vae, on_grey(rgb, alpha), alpha)
    channels = vae.config.latent_channels
    assert kernel.shape == (channels, 1, 8, 8) and bias.shape == (channels,)
    code = torch.nn.functional.conv2d(alpha, kernel, bias, stride=8)
    assert code.mean((0, 2, 3)).abs().max() < 1e-4
    values = torch.linalg.svdvals(kernel.flatten(1))
    assert (values > 1e-4 * values[0]).sum() == min(COMPONENTS, channels)
    patches = torch.nn.functional.unfold(alpha, 8, stride=8).transpose(1, 2).reshape(-1, 64)
    largest = torch.linalg.eigvalsh(patches.T.cov()).flip(0)[:COMPONENTS].sqrt()
    deviations = torch.linalg.eigvalsh(code.transpose(0, 1).flatten(1).cov()).flip(0)[:COMPONENTS].sqrt()
    assert torch.allclose(deviations, AMPLITUDE * largest.sqrt(), rtol=0.02)
    with torch.no_grad():
        z = vae.encode(on_grey(rgb, alpha)).latent_dist.mean

        def change(move: torch.Tensor) -> float:
            return float((vae.decode(z + move).sample - vae.decode(z).sample).square().mean())

        generator = torch.Generator().manual_seed(0)
        turns = [torch.linalg.qr(torch.randn(channels, channels, generator=generator)).Q for _ in range(8)]
        turned = [change(torch.einsum("ij, njhw -> nihw", turn, code)) for turn in turns]
        assert change(code) < 0.95 * sum(turned) / len(turned)


def test_only_images_that_come_near_the_border_get_a_margin() -> None:
    from sticker.transparency.images import with_margin

    alpha = torch.zeros(3, 1, 48, 48)
    alpha[0, :, 5:43, 4:44] = 1
    alpha[1, :, 20:, 10:30] = 1
    rgb = torch.tensor([0.2, 0.5, 0.9])[:, None, None] * (alpha > 0)
    made_rgb, made_alpha = with_margin(rgb, alpha, 4)
    assert all(torch.equal(made[k], given[k]) for made, given in ((made_rgb, rgb), (made_alpha, alpha)) for k in (0, 2))
    assert (made_alpha[1] > 0).nonzero()[:, 1:].amin(0).ge(4).all() and (made_alpha[1, :, 44:] == 0).all()
    assert made_alpha[1, 0, 43].max() > 0.95, "no further than needed"
    assert abs(float(made_alpha[1].sum() / alpha[1].sum()) - (40 / 48) ** 2) < 0.01
    inner = made_rgb[1, :, 26:40, 15:26]  # further inside than resampling rings
    torch.testing.assert_close(inner, rgb[1, :, 47, 20, None, None].expand_as(inner))


def test_an_uncertain_pixel_is_best_at_one_of_its_values() -> None:
    from sticker.transparency.tasks import decisive

    error = torch.arange(-100, 101) / 100
    cost = decisive(error)
    assert cost[100] == 0 and cost[0] == cost[200] == 1 and torch.equal(cost, cost.flip(0))
    assert (cost[100:].diff() > 0).all()
    value = torch.arange(101) / 100
    for chance in (0.3, 0.5, 0.8):
        expected = chance * decisive(value - 1) + (1 - chance) * decisive(value)
        assert int(expected.argmin()) == (100 if chance > 0.5 else 0)


def test_the_encoder_pays_beyond_its_budget(work: Path) -> None:
    from diffusers import AutoencoderKL
    from sticker.transparency.tasks import QUIET, JointTask

    from diffusion_accel.transparency.rgba import on_grey

    task = JointTask(work, AutoencoderKL.from_pretrained(work / "pipeline", subfolder="vae"))
    batch = task.draw(np.random.default_rng(0), 4)
    rgb, alpha, padded = batch["images"].split((3, 1, 3), 1)
    batch["noise"] = torch.zeros_like(batch["noise"])
    with torch.no_grad():
        decoded, _, made = task.model(rgb, alpha, padded, batch["noise"])
        plain = task.model.vae.decode(task.model.vae.encode(on_grey(rgb, alpha)).latent_dist.mean).sample
        assert task.lost(plain, rgb, alpha).abs() < 1e-4
        error = (plain - on_grey(rgb, alpha)) * 2
        by_hand = [(4 * (e / 2).square().mean() + QUIET) / ((e / 2).square().mean() + QUIET) for e in error]
        lost = task.lost(on_grey(rgb, alpha) + error, rgb, alpha)
        assert abs(lost - 10 * torch.stack(by_hand).log10().mean()) < 1e-3
        reconstruction = task.reconstruction(made, alpha, padded)
        beyond = (task.lost(decoded, rgb, alpha) - task.BUDGET).clamp(min=0)
        torch.testing.assert_close(task.loss(task.model, batch), reconstruction + task.PRICE * beyond)
        batch["noise"] += 0.1
        made = task.model(rgb, alpha, padded, batch["noise"])[2]
        torch.testing.assert_close(task.loss(task.model, batch), task.reconstruction(made, alpha, padded))


def test_a_denoiser_that_knows_the_image_gives_it_back(work: Path) -> None:
    from diffusers import AutoencoderKL
    from sticker.transparency.tasks import RefineTask

    from diffusion_accel.training.denoising import Process

    process, asked = Process(), []

    class Oracle(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            asked.append(timesteps)
            return process.noisy(z, process.noise_in(noisy, z, timesteps), timesteps)[1]

    vae = AutoencoderKL.from_pretrained(work / "pipeline", subfolder="vae")
    task = RefineTask(work, vae, Oracle(), process)  # type: ignore[arg-type]
    batch = task.draw(np.random.default_rng(0), 4)
    z = torch.randn(batch["noise"].shape, generator=torch.Generator().manual_seed(0))
    made = task.denoise(z, batch["gaussian"], batch["timesteps"], batch["ids"])
    torch.testing.assert_close(made, z, rtol=1e-3, atol=1e-3)
    assert torch.equal(asked[0], batch["timesteps"]) and torch.equal(asked[1], batch["timesteps"] // 2)
